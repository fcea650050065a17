"""Loads AReaL's real PPO actor with its loss, statistics and data functions, without the rest of AReaL.

``areal/__init__.py`` imports controllers, schedulers and loggers (two dozen more packages). So the packages above the
actor are empty shells here with the real search path, and four names that the actor's module imports for its
single-controller classes are empty classes. Everything that a loss runs through is AReaL's own file: the actor, its
functional losses, the statistics tracker, the configuration classes.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class TrainEngine:
    """Stands for classes that no loss touches."""


NAMES: dict[str, dict[str, Any]] = {
    "areal": {},
    "areal.api": {"TrainEngine": TrainEngine},
    "areal.experimental": {},
    "areal.experimental.training_service": {},
    "areal.experimental.training_service.controller": {},
    "areal.experimental.training_service.controller.controller": {"GatewayTrainController": TrainEngine},
    "areal.infra": {"TrainController": TrainEngine},
    "areal.infra.rpc": {},
    "areal.infra.rpc.serialization": {"serialize_value": None},
    "areal.trainer": {},
    "areal.trainer.ppo": {},
}


def load() -> Any:
    """The module ``areal.trainer.ppo.actor``, executed once a process (its imports take seconds)."""
    if "areal.trainer.ppo.actor" not in sys.modules:
        spec = find_spec("areal")
        assert spec is not None and spec.submodule_search_locations
        root = next(iter(spec.submodule_search_locations))
        for name, attributes in NAMES.items():
            package = ModuleType(name)
            package.__path__ = [root + name.removeprefix("areal").replace(".", "/")]
            package.__dict__.update(attributes)
            sys.modules[name] = package
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, package)
    return import_module("areal.trainer.ppo.actor")
