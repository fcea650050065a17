"""What the trust region did, token by token: the observer that fills a run folder.

* `RunRecorder` is the TRL engine's observer. A rollout batch (one *step*) gives one row of `positions.jsonl`
  (divergence by position, and which reasons held tokens back), one of `certificates.jsonl` and, on every `every`-th
  step, `samples/step-000010.jsonl` with a few responses and the reason, divergence and ratio of each of their tokens.

What lies in these files is a function of the training alone: no wall clock, no random choice, numbers in fixed
precision. A resumed run writes the same bytes as an uninterrupted one (`truncate_after` drops what lies ahead).
Schemas: docs/runs.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cppo import files
from cppo.engines.support import BASELINE, GROUP, REWARD, TOKENS
from cppo.files import rounded
from cppo.rules import Reason, Verdict
from cppo.rules.base import held_back
from cppo.runs.certificates import Responses, certificate_row
from cppo.runs.folder import RunFolder
from cppo.runs.positions import by_position
from cppo.tokens import TokenBatch

#: The character of each byte in the tokens of byte-level tokenizers (GPT-2's table), turned round.
BYTES: dict[str, int] = {sign: byte for byte, sign in bytes_to_unicode().items()}
#: What a decoder gives for bytes that are no whole character.
REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Token ids -> text."""


class _Call:
    """References to one observed loss (a micro-batch); nothing is copied or synchronised until the step ends."""

    def __init__(self, batch: TokenBatch, verdict: Verdict, inputs: Mapping[str, Any]):
        self.policy_logp = batch.policy_logp.detach()
        self.rollout_logp = batch.rollout_logp.detach()
        self.mask = batch.loss_mask
        shape = self.mask.shape
        self.advantages = batch.token_advantages().expand(self.mask.shape)
        divergence = verdict.divergence if verdict.divergence is not None else batch.divergence
        self.divergence = None if divergence is None else divergence.detach()
        self.threshold = None if verdict.threshold is None else verdict.threshold.detach().expand(shape)
        self.coefficient = verdict.coefficient.detach()
        self.reason = verdict.reason
        self.delta_b = verdict.delta_b
        self.budget_used = verdict.budget_used
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", REWARD, BASELINE, GROUP, TOKENS)
        self.inputs = {name: inputs[name] for name in names if inputs.get(name) is not None}

    def responses(self) -> Responses:
        """For the certificate; needs rewards."""

        def array(values: Tensor) -> Any:
            return values.cpu().numpy()

        return Responses(
            log_ratio=array(self.policy_logp.float() - self.rollout_logp.float()),
            tokens=array(self.inputs[TOKENS]),
            mask=array(self.mask),
            divergence=None if self.divergence is None else array(self.divergence.float()),
            reward=array(self.inputs[REWARD]),
            baseline=array(self.inputs[BASELINE]),
            group=array(self.inputs[GROUP]),
        )


class RunRecorder:
    """The TRL engine's observer: collects during a rollout batch, writes in `end_of_step`.

    folder: the run folder.  tokenizer: decodes prompts and tokens.  every: sample responses on every `every`-th step
    and on the last (0: never).  count: responses a sampled step.  updates: optimizer updates per rollout batch (M).
    divergence: the name of the rule's divergence, None: it measures none (for certificates.jsonl).

    Divergence by position is that of the *last* update, where the policy has moved furthest from the rollout policy.
    With several processes each sees its own rows; give the recorder to the main process alone.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Decoder,
        every: int = 10,
        count: int = 4,
        updates: int = 1,
        divergence: str | None = None,
    ):
        if every < 0 or count < 0 or updates < 1:
            raise ValueError(
                f"Got every={every}, count={count}, updates={updates}; set every >= 0 (0: no samples), count >= 0 and "
                "updates >= 1."
            )
        self.files = RunFolder(folder)
        self.every, self.count, self.updates, self.divergence = every, count, updates, divergence
        #: of the step that ended last: its surrogate gain and the bound of its error, for metrics.jsonl
        self.figures: dict[str, float | None] = {}
        self._pieces = _Pieces(tokenizer)
        self._forget()

    def _forget(self) -> None:
        self._update = -1
        self._calls: list[_Call] = []
        self._counts: dict[int, Tensor] = {}

    def __call__(self, batch: TokenBatch, verdict: Verdict, inputs: Mapping[str, Any], update: int) -> None:
        """Observe one loss. batch: padded [B, T]; inputs: TRL's minibatch; update: 0-based, in the rollout batch."""
        reason = verdict.reason
        counts = torch.stack([(reason == code).sum() for code in Reason])  # stays on the device: no synchronisation
        self._counts[update] = self._counts[update] + counts if update in self._counts else counts
        if update > self._update:
            self._update, self._calls = update, []
        if update == self._update:
            self._calls.append(_Call(batch, verdict, inputs))

    def end_of_step(self, step: int, last: bool = False) -> None:
        """Write what was collected for `step` (1-based) and start the next one. last: the run's last step.

        Nothing is written for a step in which nothing was observed.  Raises: files.DiskFullError.
        """
        self.figures = {}
        if self._calls:
            files.append_jsonl(self.files.positions_file, self._positions(step))
            self._certify(step)
            due = self.every > 0 and (step % self.every == 0 or last)
            if due and self.count:
                rows = self._samples(step)
                text = "".join(files.dumps(row) + "\n" for row in rows)
                files.atomic_write_text(self.files.samples_file(step), text)
        self._forget()

    def _certify(self, step: int) -> None:
        row = certificate_row([call.responses() for call in self._calls if REWARD in call.inputs], self.divergence)
        if row is not None:
            files.append_jsonl(self.files.certificates_file, {"step": step, "update": self._update} | row)
            self.figures = {"trust/surrogate_gain": row["surrogate"], "trust/residual_bound": row["ratios"]}

    def truncate_after(self, step: int) -> None:
        """Forget everything after `step`, in the files and in memory (resume from the checkpoint of `step`)."""
        self._forget()
        self.files.truncate_records(step)

    def _positions(self, step: int) -> dict[str, Any]:
        row: dict[str, Any] = {"step": step, "update": self._update}
        updates = sorted(self._counts)
        table = torch.stack([self._counts[update] for update in updates]).tolist()
        row["tokens"] = [sum(counts) - counts[Reason.OUTSIDE] for counts in table]
        row["reasons"] = {code.key: [counts[code] for counts in table] for code in Reason if code != Reason.OUTSIDE}
        masks = [call.mask.cpu() for call in self._calls]
        # positions are 0-based here and count loss tokens, never columns
        positions = torch.cat([(mask.cumsum(-1) - 1)[mask] for mask in masks])
        reasons = torch.cat([call.reason.cpu()[mask] for call, mask in zip(self._calls, masks, strict=True)])
        held = held_back(reasons).double()
        scores = [call.divergence for call in self._calls]
        values = None
        if all(score is not None for score in scores):
            values = torch.cat(
                [score.cpu().double()[mask] for score, mask in zip(scores, masks, strict=True) if score is not None]
            )
        return row | by_position(positions, values, held)

    def _samples(self, step: int) -> list[dict[str, Any]]:
        order: list[tuple[int, int, int]] = []
        for number, call in enumerate(self._calls):
            told = held_back(call.reason.cpu()).any(-1).int() + call.mask.cpu().any(-1).int()
            order += [(-value, number, row) for row, value in enumerate(told.tolist())]
        # first rows in which a token is held back, then others with loss tokens, then those of dropped groups
        chosen = sorted(order)[: self.count]
        offsets = [0]
        for call in self._calls:
            offsets.append(offsets[-1] + call.mask.shape[0])
        return [
            {"step": step, "update": self._update, "row": offsets[number] + row}
            | self._response(self._calls[number], row)
            for _, number, row in chosen
        ]

    def _response(self, call: _Call, row: int) -> dict[str, Any]:
        mask = call.mask[row].cpu()
        width = mask.numel()
        shown = mask.clone()
        if "completion_mask" in call.inputs:
            shown |= call.inputs["completion_mask"][row].bool().cpu()
        length = int(shown.nonzero().max()) + 1 if bool(shown.any()) else 0
        ids = call.inputs["completion_ids"][row][:length].tolist() if "completion_ids" in call.inputs else []
        prompt: list[int] = []
        if "prompt_ids" in call.inputs:
            prompt_ids = call.inputs["prompt_ids"][row]
            prompt_mask = call.inputs.get("prompt_mask")
            prompt = (prompt_ids if prompt_mask is None else prompt_ids[prompt_mask[row].bool()]).tolist()

        def numbers(values: Tensor | None) -> list[float | None] | None:
            if values is None:
                return None
            line = values[row].float().cpu().tolist()[:length]
            return [rounded(value) if inside else None for value, inside in zip(line, mask.tolist(), strict=False)]

        def per_response(values: Tensor | None) -> float | None:
            return None if values is None or values.numel() <= row else rounded(float(values.reshape(-1)[row]))

        log_ratio = call.policy_logp.float() - call.rollout_logp.float()
        advantages = call.advantages[row].float()[call.mask[row]]
        return {
            "prompt": self._pieces.text(prompt),
            "response": self._pieces.text(ids),
            "advantage": rounded(float(advantages[0])) if advantages.numel() else None,
            "delta_b": per_response(call.delta_b),
            "budget_used": per_response(call.budget_used),
            "ids": ids,
            "tokens": self._pieces.split(ids),
            "mask": mask[:length].int().tolist() if width else [],
            "reason": [Reason(code).key for code in call.reason[row][:length].tolist()],
            "coefficient": numbers(call.coefficient),
            "divergence": numbers(call.divergence),
            "threshold": numbers(call.threshold),
            "ratio": numbers(log_ratio.exp()),
            "log_ratio": numbers(log_ratio),
            "policy_logp": numbers(call.policy_logp),
            "rollout_logp": numbers(call.rollout_logp),
            "advantages": numbers(call.advantages),
        }


class _Pieces:
    """Decodes token by token such that the pieces read like the text, without a quadratic number of decodes."""

    def __init__(self, tokenizer: Decoder):
        self._tokenizer = tokenizer
        self._single: dict[int, str] = {}

    def _alone(self, token: int) -> str:
        """A token by itself; what is part of a character as bytes, such as ``\\xe2``."""
        piece = self.text([token])
        name = getattr(self._tokenizer, "convert_ids_to_tokens", lambda _: None)(token)
        if REPLACEMENT not in piece or not isinstance(name, str):
            return piece
        if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):  # SentencePiece's bytes
            return f"\\x{found[1].lower()}"
        if not set(name) <= BYTES.keys():
            return piece
        return bytes(BYTES[sign] for sign in name).decode("utf-8", "backslashreplace")

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False)) if ids else ""

    def split(self, ids: Sequence[int]) -> list[str]:
        pieces: list[str] = []
        for at, token in enumerate(ids):
            if token not in self._single:
                self._single[token] = self._alone(token)
            piece = self._single[token]
            if at:
                # SentencePiece-like tokenizers drop the space before a token that is decoded alone
                before, pair = self._single[ids[at - 1]], self.text([ids[at - 1], token])
                if before and REPLACEMENT not in pair and pair.startswith(before) and len(pair) > len(before):
                    piece = pair[len(before) :]
            pieces.append(piece)
        return pieces
