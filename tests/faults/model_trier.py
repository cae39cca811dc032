"""``python -m tests.faults.model_trier NATIVE``: tries the model files listed on standard input, one after another.

`fedbpt.models.trial` starts a process per file; this one continues until it dies, and prints "next" after each file.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location

MEMORY_BYTES, CPU_S = 2 << 30, 4

if __name__ == "__main__":
    spec = spec_from_file_location("_native", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    native = module_from_spec(spec)
    spec.loader.exec_module(native)
    for line in sys.stdin:
        native.try_alone(line.strip().encode(), 1, 0, "", False, MEMORY_BYTES, CPU_S)
        print("next", flush=True)
