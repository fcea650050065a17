"""The policy: a small Qwen3-architecture model made from its config, or one loaded from a folder or the hub."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cppo import files
from cppo.config.load import Config
from cppo.engines.sampling import SAMPLING
from cppo.errors import UserError
from cppo.runs.folder import RunFolder
from cppo.training.sources import ModelSource, check_fits, check_round_trip, find_source

SPECIAL = ("<pad>", "<eos>", "<unk>")


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerBase:
    """One token a character of `alphabet`, after <pad> = 0, <eos> = 1, <unk> = 2 (what the alphabet lacks)."""
    characters = dict.fromkeys(alphabet)
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # not ".": a newline is a character, too
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_model(settings: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A Qwen3-architecture model with random weights (`settings`: the recipe's section ``tiny``), float32.

    With `settings.experts` it is a mixture of experts: every layer has that many, and the router's weights are
    normalised over those that a token takes.

    The initial scale matters at this width: with transformers' default of 0.02 a model of width 64 did not learn, with
    0.1 it did.
    """
    taken = 1 if settings.experts is None else settings.experts_per_token
    width = settings.intermediate_size or 4 * settings.hidden_size // taken
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size,
        "intermediate_size": width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "head_dim": settings.hidden_size // settings.heads,
        "max_position_embeddings": settings.max_positions,
        "initializer_range": settings.initializer_range,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
    }
    mixture = {
        "num_experts": settings.experts,
        "num_experts_per_tok": taken,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
    }
    # A generator of its own would not reach the model's initialisers; the global one is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel
        if settings.experts is None:
            model = Qwen3ForCausalLM(Qwen3Config(**common))
        else:
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **mixture))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, padding on the left.

    Raises
    ------
    UserError : there is none; it has neither pad nor end token.
    """
    found = find_source(source)
    gguf = {} if found.gguf is None else {"gguf_file": found.gguf}
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.place, trust_remote_code=False, **gguf)
    except (OSError, ValueError, KeyError) as error:
        what = "the folder" if Path(source).exists() else "the hub id"
        raise UserError(
            f"model={source}: no tokenizer could be loaded from {what} ({_first_line(error)}). Save one beside the "
            "model with tokenizer.save_pretrained(...), or check the name."
        ) from error
    # Without files transformers makes an empty tokenizer from the model's type, by which every text is of length 0.
    if len(tokenizer) <= len(tokenizer.all_special_ids) or not tokenizer("1 a")["input_ids"]:
        raise UserError(
            f"model={source}: there is no tokenizer (no vocabulary was found). Save one beside the model with "
            "tokenizer.save_pretrained(...)."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model={source}: the tokenizer has neither a pad nor an end-of-sequence token; set one of them."
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if found.gguf is not None:
        check_round_trip(source, tokenizer)
    return tokenizer


def load_model(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model from a folder or hub id, weights from safetensors.

    Raises
    ------
    UserError : it cannot be loaded (what transformers says, in one sentence).
    """
    found = find_source(source)
    if found.gguf is not None:
        return _load_gguf(found, dtype)
    adapter = (Path(source) / "adapter_config.json").exists()  # LoRA: transformers loads the base model, too
    if Path(source).exists() and not adapter and not (Path(source) / "config.json").exists():
        raise UserError(f"model={source}: the folder holds no config.json, so it is not a model folder.")
    try:
        if not adapter:
            AutoConfig.from_pretrained(source, trust_remote_code=False)
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model={source}: the model could not be loaded ({_first_line(error)}). Expected 'tiny', a folder that "
            "holds a transformers model (config.json and *.safetensors), or a hub id that can be reached."
        ) from error


def _load_gguf(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """The dequantised weights of a GGUF file in an ordinary model of `dtype`.

    transformers marks the model that it loads as quantised and then refuses to save it ("not serializable"), although
    every weight is an ordinary number: hence a fresh model from the configuration without that mark.

    Raises
    ------
    UserError : an architecture that transformers does not read from GGUF.
    """
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source.place, gguf_file=source.gguf, dtype=torch.float32)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"model={source.given}: transformers cannot load this GGUF file ({_first_line(error)}). Take the model as "
            "a transformers folder (config.json and *.safetensors), or a GGUF of an architecture that it reads (Llama, "
            "Qwen2, Qwen3, Gemma, Mistral ...)."
        ) from error
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    with torch.random.fork_rng(devices=[]):  # its random weights are overwritten; the run's random state is not touched
        model = type(loaded)(config).to(dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = copy.deepcopy(loaded.generation_config)
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def plain_sampling(model: PreTrainedModel) -> list[str]:
    """Take out of the model's generation_config what bends the distribution that is sampled from; says what it was.

    transformers falls back to these options for each that a caller leaves open, so that rollouts would come from
    another distribution than the one that is scored, and an evaluation would not be what its settings say.
    """
    config, found = model.generation_config, []
    for name, neutral in SAMPLING.items():
        value = getattr(config, name, None)
        if not neutral(value):
            found.append(f"{name}={value!r}")
            setattr(config, name, None)
    return found


def evaluation_dtype() -> torch.dtype:
    """bfloat16 on a GPU that has it, else float32."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def build_policy(config: Config, alphabet: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a run before any training.

    Weights are float32 whatever the precision of forward and backward: at a learning rate of 1e-6 most updates are
    smaller than the spacing of bfloat16 numbers and would be lost.
    """
    if config.model == "tiny":
        if not alphabet:
            raise UserError(
                f"model=tiny needs to know the characters of the task, but task {config.task.name!r} has no "
                "`alphabet`. Give the task one, or set model=<folder or hub id>."
            )
        tokenizer = character_tokenizer(alphabet)
        return tiny_model(config.tiny, tokenizer, config.seed), tokenizer
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, torch.float32)
    check_fits(find_source(config.model), tokenizer, model.get_input_embeddings().num_embeddings)
    return model, tokenizer


def load_checkpoint(path: Path) -> PreTrainedModel:
    """The policy of a checkpoint, float32 (of an adapter with its base model)."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def save_best(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    weights: dict[str, Any] | None = None,
) -> None:
    """Keep the policy of `step` as best/step-000010, loadable by AutoModelForCausalLM; the best before it goes.

    `weights` are those of a sharded model, gathered; else the model's own are saved.
    """
    target = RunFolder(folder).best / f"step-{step:06d}"
    with files.atomic_folder(target) as temporary:
        model.save_pretrained(temporary, **({} if weights is None else {"state_dict": weights}))
        tokenizer.save_pretrained(temporary)
    for other in (RunFolder(folder).best).glob("step-*"):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
