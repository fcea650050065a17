"""The Tinker SDK's `TrainingClient` without a service: its two remote calls are answered here.

`forward_backward_custom` and all it does with data, gradients, weights and futures is the SDK's. `forward` and
`forward_backward` are computed by `log_probabilities`: targets ``[L]`` or ``[L, M]`` of a datum -> their log pi, and
the cross entropy -sum(weights * log pi) that the API documents. Requests are encoded as the SDK would send them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import torch
from tinker import TrainingClient, types
from tinker.lib.public_interfaces.api_future import APIFuture, AwaitableConcurrentFuture
from tinker.proto.request_conv import forward_backward_request_to_proto
from torch import Tensor


class Holder:
    """Runs the SDK's coroutines."""

    def run_coroutine_threadsafe(self, coroutine: Coroutine[Any, Any, Any]) -> APIFuture[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(asyncio.run(coroutine))
        except Exception as error:
            future.set_exception(error)
        return AwaitableConcurrentFuture(future)


class LocalClient(TrainingClient):
    """A client of a model in this process."""

    def __init__(self, log_probabilities: Callable[[types.Datum], Tensor], flat: bool = False) -> None:
        self.holder = Holder()
        self.log_probabilities = log_probabilities
        self.flat = flat  # a server that knows targets [L] only, and answers for column 0
        self.sent: list[types.Datum] = []

    def forward(self, data: list[types.Datum], loss_fn: str, loss_fn_config: Any = None) -> APIFuture[Any]:
        return self._answer(data, loss_fn, backward=False)

    def forward_backward(self, data: list[types.Datum], loss_fn: str, loss_fn_config: Any = None) -> APIFuture[Any]:
        self.sent = list(data)
        return self._answer(data, loss_fn, backward=True)

    def _answer(self, data: Sequence[types.Datum], loss_fn: str, backward: bool) -> APIFuture[Any]:
        assert loss_fn == "cross_entropy"
        body = types.ForwardBackwardInput(data=list(data), loss_fn=loss_fn)
        request = types.ForwardBackwardRequest(forward_backward_input=body, model_id="local", seq_id=1)
        assert forward_backward_request_to_proto(request).SerializeToString()
        outputs, loss = [], torch.zeros(())
        for datum in data:
            logp = self.log_probabilities(datum)
            weights = datum.loss_fn_inputs["weights"].to_torch()
            assert weights.shape == logp.shape
            loss = loss - (weights * logp).sum()
            told = logp[:, 0] if self.flat and logp.dim() == 2 else logp
            outputs.append({"logprobs": types.TensorData.from_torch(told.detach().float())})
        if backward:
            loss.backward()
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(types.ForwardBackwardOutput("scalar", outputs, {"loss:sum": loss.item()}))
        return AwaitableConcurrentFuture(future)
