"""verl on a CPU, for the tests: name it first in VERL_USE_EXTERNAL_MODULES, with this folder on PYTHONPATH.

verl imports it in every process. It lies outside the package `cppo_cpu`: a process that unpickles something from there
first would import verl half-way through that package, and verl would then find this module's imports unfinished.
"""

import cppo_cpu.platform
import cppo_cpu.register  # noqa: F401  after the platform: what it imports may ask for the platform
