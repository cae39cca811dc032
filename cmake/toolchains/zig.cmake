# Cross compilation with the C and C++ compiler of the package `ziglang` (Clang, libc++ linked in, the headers of any glibc).
# A toolchain file sets ZIG_TARGET, as in x86_64-linux-gnu.2.27, and CMAKE_SYSTEM_PROCESSOR, then includes this one.
set(CMAKE_SYSTEM_NAME Linux)

find_program(PYTHON_OF_ZIG NAMES python3 python REQUIRED) # the first of PATH: make has it be that of .venv
execute_process(
  COMMAND "${PYTHON_OF_ZIG}" -c "import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).parent / 'zig')"
  OUTPUT_VARIABLE ZIG OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT ZIG)
  message(FATAL_ERROR "${PYTHON_OF_ZIG} has no package ziglang: pip install ziglang, or use `make wheel`")
endif()
execute_process(COMMAND "${ZIG}" version OUTPUT_VARIABLE ZIG_VERSION OUTPUT_STRIP_TRAILING_WHITESPACE)

# One place for all build folders and CMake's own trials: paths, and so ccache's keys, stay the same.
set(ZIG_TOOLS "${CMAKE_CURRENT_LIST_DIR}/../../build/zig/${ZIG_TARGET}")
foreach(ZIG_TOOL cc c++ ar ranlib)
  configure_file("${CMAKE_CURRENT_LIST_DIR}/zig.sh.in" "${ZIG_TOOLS}/${ZIG_TOOL}"
    FILE_PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ GROUP_EXECUTE WORLD_READ WORLD_EXECUTE @ONLY)
endforeach()
set(CMAKE_C_COMPILER "${ZIG_TOOLS}/cc")
set(CMAKE_CXX_COMPILER "${ZIG_TOOLS}/c++")
set(CMAKE_AR "${ZIG_TOOLS}/ar")
set(CMAKE_RANLIB "${ZIG_TOOLS}/ranlib")

# what a linker strips, no `strip` for another machine need read
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-Wl,-s")
set(CMAKE_MODULE_LINKER_FLAGS_INIT "-Wl,-s")

# Python's headers are those of the machine that builds
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
