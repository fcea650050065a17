"""One of two processes of test_megatron.py: D from this rank's part of the logits against D from all of them."""

from __future__ import annotations

import os

import torch
from megatron.core import parallel_state
from test_tensors import packed_rows
from verl.models.mcore.util import preprocess_thd_engine
from verl.workers.config import McoreActorConfig

from cppo.engines.verl import loss as verl_loss

torch.distributed.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
single, data, logits = packed_rows()
whole = verl_loss.trust_region_loss(single, data=data, student_logits=logits)[verl_loss.DIVERGENCE][0]
config = McoreActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=single.policy_loss)
offsets = data["input_ids"].offsets()
rows = torch.nested.nested_tensor_from_jagged(logits[0], offsets)
wanted = torch.nested.nested_tensor_from_jagged(whole, offsets)
for name, tensor, context in (("tensor", 2, 1), ("context", 1, 2)):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, context_parallel_size=context)
    local = preprocess_thd_engine(rows, pre_process=True)[0]
    columns = local.shape[-1] // tensor
    rank = parallel_state.get_tensor_model_parallel_rank()
    local = local[..., rank * columns : (rank + 1) * columns].contiguous()
    found = verl_loss.trust_region_loss(config, data=data, student_logits=local)[verl_loss.DIVERGENCE]
    expected = preprocess_thd_engine(wanted, pre_process=True)[0]
    # padding between sequences (Megatron aligns them) holds zeros in `expected` and anything in `found`
    real = preprocess_thd_engine(torch.nested.nested_tensor_from_jagged(torch.ones_like(whole), offsets))[0] > 0
    assert found.shape == local.shape[:2] == expected.shape, (found.shape, local.shape, expected.shape)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (expected[real].nan_to_num() > 0.01).sum() > 5
    print(f"{name} parallel: {found[real].numel()} rows agree", flush=True)
    parallel_state.destroy_model_parallel()
torch.distributed.destroy_process_group()
