"""CPPO's rules inside verl 0.9: policy losses, their configuration, trainers, top-K from the sampler.

`cppo_verl_plugin` (entry point group ``verl.plugins``) registers everything; docs/verl.md tells what to set.

verl is imported here, before any module of this package: verl then loads the plug-in, which imports these modules from
scratch. Were a worker to unpickle something from `cppo.engines.verl.loss` before verl is there, verl would find that
module half imported, and skip the plug-in without a word.
"""

import contextlib

with contextlib.suppress(ModuleNotFoundError):  # composing a command (`cppo launch`) works without verl
    import verl  # noqa: F401
