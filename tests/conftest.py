"""What holds for all tests: no network, the same examples in every run, and Ctrl-C that works."""

from __future__ import annotations

import os
import signal

# A shell starts background jobs with SIGINT ignored, and their children inherit that; tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# before anything imports transformers or datasets
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRL_EXPERIMENTAL_SILENCE", "TORCHINDUCTOR_COMPILE_THREADS"):
    os.environ.setdefault(name, "1")

from hypothesis import settings  # noqa: E402

# Machines that run CI share their cores, so no deadline; a failure that cannot be repeated helps nobody.
settings.register_profile("cppo", deadline=None, derandomize=True)
settings.load_profile("cppo")
