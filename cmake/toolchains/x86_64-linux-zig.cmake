# Linux on x86_64 with glibc 2.27 or newer.
set(CMAKE_SYSTEM_PROCESSOR x86_64)
set(ZIG_TARGET x86_64-linux-gnu.2.27)
include("${CMAKE_CURRENT_LIST_DIR}/zig.cmake")
