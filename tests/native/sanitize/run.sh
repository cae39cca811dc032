#!/usr/bin/env bash
# Runs pytest on the package in SITE, whose native module was built with sanitizers: run.sh PYTHON SITE ARGUMENTS...
# `make sanitize` builds it. Ends non-zero where a test fails, a sanitizer stops a process, or memory leaks.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
python=$1 site=$2
shift 2

# The runtime must come before all else; and libstdc++ with it, or it finds no __cxa_throw to watch.
preload=$(ldd "$site"/fedbpt/_native*.so | awk '/libasan|libclang_rt.asan|libstdc\+\+/ {print $3}' | paste -sd:)

# The interpreter behind the environment, with the environment's packages as a plain folder: an editable install of
# fedbpt hooks itself in by a .pth file, and would come before SITE.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
base=$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))')

# PYTHONMALLOC: the leak check follows pointers through malloc's memory, not through Python's arenas.
# --capture=sys and no faulthandler: a report goes to stderr even as it ends pytest.
exec env \
  LD_PRELOAD="$preload" \
  PYTHONPATH="$site:$packages" \
  PYTHONMALLOC=malloc \
  ASAN_OPTIONS="detect_leaks=${LEAKS:-1}:detect_stack_use_after_return=1:strict_string_checks=1:check_initialization_order=1:allocator_may_return_null=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}" \
  LSAN_OPTIONS="suppressions=$here/leaks.supp:print_suppressions=0${LSAN_OPTIONS:+:$LSAN_OPTIONS}" \
  UBSAN_OPTIONS="print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}" \
  "$base" -m pytest --capture=sys -p no:faulthandler -p no:cacheprovider "$@"
