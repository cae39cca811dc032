# Linux on aarch64 with glibc 2.27 or newer (Ubuntu 18.04, which a Jetson TX2 runs).
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(ZIG_TARGET aarch64-linux-gnu.2.27)
include("${CMAKE_CURRENT_LIST_DIR}/zig.cmake")
