"""From a task's question to what the model reads: one rendering for rollouts, evaluation, warm-up and samples.

A task gives a text or messages. With a chat template (`prompt.format=auto`, or `chat`) a text becomes the message of a
user; `prompt.system` stands before it, `prompt.suffix` behind it. TRL renders messages itself, with the same template
and the same arguments (`chat_template_kwargs`); `PromptFormat.ids` gives the same token ids for everything else.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from cppo.config.settings import Prompt
from cppo.errors import UserError

Messages = list[dict[str, str]]

#: A question that every template should be able to render.
PROBE = "What is 1 + 1?"


class PromptFormat:
    """How prompts of a run look.

    Raises
    ------
    UserError : the settings ask for a chat and the tokenizer has no template, or its template fails on them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Prompt) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        template = tokenizer.chat_template is not None
        if settings.format == "chat" and not template:
            raise UserError(
                "prompt.format is chat, but the model's tokenizer has no chat template. Set prompt.format=text, or "
                "take an instruction-tuned model."
            )
        self.chat = template and settings.format != "text"
        if not self.chat and (settings.system is not None or settings.template):
            given = "prompt.system" if settings.system is not None else "prompt.template"
            why = "prompt.format is text" if template else "the model's tokenizer has no chat template"
            raise UserError(f"{given} is set, but {why}: only a chat has it. Remove it.")
        if self.chat:
            self._probe()

    def _probe(self) -> None:
        """Refuse a template that fails on what it will be given, before anything long starts."""
        try:
            self._rendered(self.of(PROBE), tokenize=False)
        except Exception as error:  # a template is a program of its own and raises what it likes
            without = " It has a system message (prompt.system): set it to null." if self.settings.system else ""
            raise UserError(
                f"the model's chat template fails on a prompt of this run ({type(error).__name__}: {error}).{without} "
                "prompt.template holds its arguments; prompt.format=text leaves it out."
            ) from error

    def of(self, prompt: str | Messages) -> str | Messages:
        """What TRL gets: messages for a chat, else text; with the settings' system message and suffix."""
        suffix = self.settings.suffix
        if isinstance(prompt, str):
            text = prompt + suffix
            if not self.chat:
                return text
            messages = [{"role": "user", "content": text}]
        else:
            messages = [dict(message) for message in prompt]
            messages[-1]["content"] += suffix
            if not self.chat:
                return "\n\n".join(message["content"] for message in messages) + "\n\n"
        if self.settings.system is not None:
            messages = [{"role": "system", "content": self.settings.system}] + [
                message for message in messages if message["role"] != "system"
            ]
        return messages

    def ids(self, prompt: str | Messages) -> list[int]:
        """Token ids of a prompt, as in a rollout."""
        given = self.of(prompt)
        if isinstance(given, str):
            return list(self.tokenizer(given)["input_ids"])
        return list(self._rendered(given, tokenize=True)["input_ids"])

    def text(self, prompt: str | Messages) -> str:
        """The prompt as the model reads it, special tokens included."""
        return str(self.tokenizer.decode(self.ids(prompt), skip_special_tokens=False))

    def _rendered(self, messages: str | Messages, tokenize: bool) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=tokenize, return_dict=tokenize, **self.settings.template
        )
