#!/usr/bin/env bash
# Runs pytest on the package in SITE, whose native module was built with sanitizers: run.sh PYTHON SITE ARGUMENTS...
# `make sanitize` builds it. Ends non-zero where a test fails, a sanitizer stops a process, or the module leaks memory.
set -euo pipefail
python=$1 site=$2
shift 2

# The sanitizer runtime must be loaded first, together with libstdc++, or it finds no __cxa_throw to intercept.
preload=$(ldd "$site"/fedbpt/_native*.so | awk '/libasan|libclang_rt.asan|libstdc\+\+/ {print $3}' | paste -sd:)

# Use the interpreter behind the environment, with the environment's packages as a plain folder: an editable install of
# fedbpt is activated by a .pth file, and would come before SITE.
base=$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))')
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')

reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT

# exitcode=0: Python and its packages leak too, so the reports are filtered below. abort_on_error: other errors than
# leaks end the process. PYTHONMALLOC: the leak detector follows pointers through memory from malloc,
# but not through Python's own arenas.
status=0
env LD_PRELOAD="$preload" PYTHONPATH="$site:$packages" PYTHONMALLOC=malloc \
  ASAN_OPTIONS="log_path=$reports/report:exitcode=0:abort_on_error=1:detect_leaks=1:detect_stack_use_after_return=1:allocator_may_return_null=1" \
  UBSAN_OPTIONS="print_stacktrace=1" \
  "$base" -m pytest -p no:faulthandler -p no:cacheprovider "$@" || status=$?

# Each report is a paragraph; a report with a frame in our module is an error.
awk -v RS= '/_native\.[^ ]*\.so|fedbpt_native|llama\.cpp/ {print $0 "\n"; ours = 1} END {exit ours}' "$reports"/* >&2 || status=1
exit "$status"
