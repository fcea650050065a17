"""Whether a model fits into the memory of this machine, asked before it is loaded: a kill says nothing."""

from __future__ import annotations

import psutil

from cppo.config.load import Config
from cppo.errors import UserError
from cppo.training.sources import ModelSource

#: Bytes a parameter in float32: the weight; where all are trained also its gradient and Adam's two moments.
WEIGHT, TRAINED = 4, 16


def check_memory(source: ModelSource, config: Config) -> None:
    """Refuse a model that does not fit. Activations and logits come on top and are not counted.

    Raises
    ------
    UserError : less is available; says how much.
    """
    if source.parameters is None:
        return
    each = TRAINED if config.peft is None else WEIGHT
    need, free = each * source.parameters, psutil.virtual_memory().available
    if need > free:
        advice = ", or train an adapter (peft={r: 16}), which needs a quarter" if config.peft is None else ""
        raise UserError(
            f"model={source.given}: {source.parameters / 1e6:,.0f} million parameters need {need / 1e9:.1f} GB at "
            f"least to be trained in float32, and {free / 1e9:.1f} GB of memory are available. Take a smaller "
            f"model{advice}."
        )
