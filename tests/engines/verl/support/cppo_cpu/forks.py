"""`tests/forks.py` with what verl's processes import: 12 seconds of CPU for each of the nine workers of a run.

    python -m cppo_cpu.forks SOCKET

Ray starts each worker with the runtime environment's ``py_executable``, which is `tests/forked_python.py` then.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))
from forks import serve

del sys.path[0]  # the tests' folders are no modules of verl's processes

if __name__ == "__main__":
    # Ray's C++ part reads these two when it is imported, and never again. The first job of a cluster has this number;
    # workers that watch this process instead of Ray's daemon are killed by whoever started the run.
    os.environ |= {"RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": str(os.getpid())}
    serve(sys.argv[1], ("verl.trainer.main_ppo", "verl.trainer.ppo.v1", "datasets", "peft"))
