"""The sampler records what it sampled from: against forward passes of single responses, and its random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cppo.engines.trl.sampler import Sampled, draw_one, sample
from cppo.errors import StopError

END = 3
SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)).train()


PROMPTS = [[5, 6, 7], [5, 6, 7], [8], [9, 10, 11, 12, 13], [8], [5, 6, 7]] * 4


def draw(model: Any, seed: int = 1, temperature: float = 1.0, top_k: int = 5, length: int = 24) -> Sampled:
    torch.manual_seed(seed)
    return sample(model, PROMPTS, max_new_tokens=length, temperature=temperature, ends=[END], pad=0, top_k=top_k)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_mu_is_what_a_forward_pass_of_the_response_alone_gives(model: Any, temperature: float) -> None:
    drawn = draw(model, temperature=temperature)
    lengths = {len(tokens) for tokens in drawn.tokens}
    assert len(lengths) > 4  # responses ended at many places, so the batch has shrunk more than once
    model.eval()
    with torch.no_grad():
        for prompt, tokens, logp, ids, top in zip(
            PROMPTS, drawn.tokens, drawn.logp, drawn.top_ids or [], drawn.top_logp or [], strict=True
        ):
            logits = model(torch.tensor([[*prompt, *tokens.tolist()]])).logits[0, len(prompt) - 1 : -1]
            want = (logits.double() / temperature).log_softmax(-1)
            torch.testing.assert_close(logp.double(), want.gather(-1, tokens[:, None])[:, 0], rtol=0, atol=1e-4)
            torch.testing.assert_close(top.double(), want.topk(5, -1).values, rtol=0, atol=1e-4)
            torch.testing.assert_close(top.double(), want.gather(-1, ids), rtol=0, atol=1e-4)
    model.train()


def test_responses_end_with_the_end_token_or_at_the_limit(model: Any) -> None:
    for tokens in draw(model).tokens:
        assert END not in tokens[:-1].tolist()
        assert len(tokens) == 24 or tokens[-1] == END


def test_the_same_random_state_gives_the_same_responses(model: Any) -> None:
    first, again, other = draw(model), draw(model), draw(model, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.tokens, again.tokens, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.tokens, other.tokens, strict=True))
    assert model.training  # as it was


def test_tokens_come_with_their_probabilities(model: Any) -> None:
    """Frequencies of first tokens against mu, by a chi-square that fails once in ten thousand right samplers."""
    torch.manual_seed(0)
    count = 4000
    drawn = sample(model, [[8]] * count, max_new_tokens=1, temperature=1.0, ends=[END], pad=0)
    assert drawn.top_ids is None and drawn.top_logp is None
    seen = torch.bincount(torch.cat(drawn.tokens), minlength=29).double()
    with torch.no_grad():
        mu = model.eval()(torch.tensor([[8]])).logits[0, -1].double().softmax(-1)
    model.train()
    common = mu * count >= 5
    statistic = ((seen - mu * count) ** 2 / (mu * count))[common].sum()
    # the chi-square's mean is its number of cells and its variance twice that
    cells = int(common.sum())
    assert float(statistic) < cells + 3.7 * (2 * cells) ** 0.5 + 8


def test_one_uniform_number_draws_each_token_with_its_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 1e-9, 0.25, 0.25 - 1e-9, 0.0]).expand(1000, 7)
    for u, token in ((0.0, 1), (0.4999, 1), (0.5 + 2e-10, 3), (0.5 + 2e-9, 4), (0.76, 5), (1.0, 5)):
        monkeypatch.setattr(torch, "rand", lambda *size, u=u, **options: torch.full(size, u, **options))
        assert draw_one(p[:2]).tolist() == [[token], [token]]
    monkeypatch.undo()
    torch.manual_seed(0)
    counts = torch.stack([draw_one(p)[:, 0].bincount(minlength=7) for _ in range(40)]).sum(0)
    assert counts[[0, 2, 6]].sum() == 0
    torch.testing.assert_close(counts[[1, 4, 5]] / 40_000, torch.tensor([0.5, 0.25, 0.25]), rtol=0, atol=0.01)


def test_logits_that_are_no_numbers_stop_the_run_in_a_sentence() -> None:
    with pytest.raises(StopError, match="logits hold NaN or infinity"):
        draw_one(torch.tensor([[0.5, 0.5], [float("nan"), 1.0]]))
