"""Where a model comes from, and how prompts look: a GGUF file, folders, packages, chat templates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("gguf", reason="GGUF files are read with the package gguf (pip install 'cppo[models]')")
from made_gguf import write_gguf

from cppo.config.load import MODEL_RECIPE, ConfigError, load_config
from cppo.config.settings import Prompt
from cppo.errors import UserError
from cppo.runs.folder import RunFolder
from cppo.runs.prepare import prepare_folder
from cppo.training.memory import check_memory
from cppo.training.models import build_policy, load_model, load_tokenizer, plain_sampling
from cppo.training.prompts import PromptFormat
from cppo.training.sources import ROUND_TRIPS, ModelSource, check_fits, check_round_trip, find_source


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def tokenizer(gguf: Path) -> Any:
    return load_tokenizer(str(gguf))


# -- GGUF --------------------------------------------------------------------------------------------------------------


def test_a_gguf_becomes_a_model_that_can_be_saved(gguf: Path, tokenizer: Any, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    model = load_model(str(gguf), torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)  # a run's random state does not depend on the format
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = load_model(str(tmp_path), torch.float32), load_tokenizer(str(tmp_path))
    ids = torch.tensor([tokenizer("the 12 + 3")["input_ids"]])
    assert words("the 12 + 3")["input_ids"] == ids[0].tolist()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert not hasattr(again.config, "quantization_config")


def test_the_policy_of_a_run_is_made_from_a_gguf(gguf: Path) -> None:
    model, tokenizer = build_policy(load_config(None, [f"model={gguf}"]), None)
    assert model.dtype == torch.float32 and tokenizer.eos_token_id == 1 and tokenizer.padding_side == "left"


def test_a_run_names_the_model_and_its_licence(gguf: Path, tmp_path: Path) -> None:
    told = find_source(str(gguf)).described()
    assert told == {"model": str(gguf), "name": "Tiny", "license": "apache-2.0"}
    folder = prepare_folder(load_config(None, [f"model={gguf}", f"output_dir={tmp_path / 'run'}"]), None, told)
    assert RunFolder(folder).versions()["model"] == told


def test_a_model_that_does_not_fit_is_a_sentence(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model(str(gguf), torch.float32).save_pretrained(tmp_path)
    source = find_source(str(gguf))
    assert source.parameters == find_source(str(tmp_path)).parameters == 259 * 32 + 32 + 2 * 32 + 10 * 32 * 32
    memory = psutil.virtual_memory()._replace(available=16 * source.parameters)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    config = load_config(None, [f"model={gguf}"])
    check_memory(source, config)
    memory = memory._replace(available=16 * source.parameters - 1)
    with pytest.raises(UserError, match=r"0 million parameters need 0\.0 GB at least"):
        check_memory(source, config)
    check_memory(source, load_config(None, [f"model={gguf}", "peft={r: 2}"]))


def test_a_generation_config_that_bends_sampling_is_taken_out_and_named(gguf: Path) -> None:
    model = load_model(str(gguf), torch.float32)
    assert plain_sampling(model) == []
    model.generation_config.update(top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, do_sample=True)
    assert plain_sampling(model) == ["top_p=0.9", "top_k=5", "min_p=0.1", "repetition_penalty=1.2"]
    assert plain_sampling(model) == [] and model.generation_config.eos_token_id is not None


def test_a_gguf_inside_a_package_is_found_without_importing_it(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "brings_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes(gguf.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    found = find_source("package:brings_a_model/tiny.gguf")
    assert found.path == package / "tiny.gguf" and found.package is None
    assert "brings_a_model" not in sys.modules
    with pytest.raises(UserError, match=r"no file 'other.gguf'; it holds tiny.gguf"):
        find_source("package:brings_a_model/other.gguf")


@pytest.mark.parametrize("share", [0.0001, 0.05, 0.6, 0.999])
def test_a_cut_off_gguf_is_a_sentence(gguf: Path, tmp_path: Path, share: float) -> None:
    whole = gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: max(4, int(share * len(whole)))])
    with pytest.raises(UserError, match="cut off"):
        find_source(str(path))


@pytest.mark.parametrize(
    "model, words",
    [
        ("package:no_such_package/file.gguf", "no package 'no_such_package' is installed"),
        ("package:os.path/file.gguf", "expected package:MODULE/FILE with a top-level module"),
        ("package:pytest/../secret.gguf", "expected package:MODULE/FILE with a top-level module"),
        ("models/none.gguf", "there is no such file"),
    ],
)
def test_a_source_that_is_not_there_is_a_sentence(model: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_source(model)


def test_a_file_of_another_kind_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="is not a GGUF file"):
        find_source(str(tmp_path / "model.bin"))


def test_an_architecture_that_transformers_does_not_read_is_a_sentence(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "rwkv.gguf", architecture="rwkv6")
    with pytest.raises(UserError, match=r"cannot load this GGUF file .*rwkv6"):
        load_model(str(path), torch.float32)


def test_the_tokenizer_of_a_gguf_gives_texts_back(tokenizer: Any) -> None:
    check_round_trip("tiny.gguf", tokenizer)

    class Lossy:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return tokenizer(text.replace("  ", " "), add_special_tokens=False)  # as a wrong normaliser would

        decode = tokenizer.decode

    with pytest.raises(UserError, match="does not give texts back"):
        check_round_trip("tiny.gguf", Lossy())
    assert any("  " in text for text in ROUND_TRIPS)


def test_a_tokenizer_of_another_model_is_a_sentence(tokenizer: Any) -> None:
    source = ModelSource("folder", "folder")
    check_fits(source, tokenizer, len(tokenizer))
    check_fits(source, tokenizer, len(tokenizer) + 4)  # padded for speed
    for rows in (len(tokenizer) - 1, 4 * len(tokenizer)):
        with pytest.raises(UserError, match="different models"):
            check_fits(source, tokenizer, rows)


def test_a_model_without_an_end_token_is_a_sentence(gguf: Path) -> None:
    tokenizer = load_tokenizer(str(gguf))
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        check_fits(ModelSource("folder", "folder"), tokenizer, len(tokenizer))


def test_settings_for_random_weights_are_not_taken_for_a_trained_model() -> None:
    assert load_config(None, ["model=some/model"]).name == MODEL_RECIPE
    assert load_config(None, ["model=tiny"]).name == "arithmetic"
    with pytest.raises(ConfigError, match="would undo the training"):
        load_config("arithmetic", ["model=some/model", "warmup.steps=10"])


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_a_text_becomes_a_chat_where_there_is_a_template(tokenizer: Any) -> None:
    chat = PromptFormat(tokenizer, Prompt(system="Be short.", suffix=" Answer:"))
    assert chat.text("1 + 1?") == "<|system|>Be short.<|end|><|user|>1 + 1? Answer:<|end|><|assistant|>"
    messages = [{"role": "system", "content": "old"}, {"role": "user", "content": "1 + 1?"}]
    assert chat.ids(messages) == chat.ids("1 + 1?")
    assert messages[0]["content"] == "old"  # what the task gave is not changed
    assert PromptFormat(tokenizer, Prompt(format="text")).text("1 + 1?") == "1 + 1?"


def test_without_a_template_messages_are_joined(gguf: Path) -> None:
    tokenizer = load_tokenizer(str(gguf))
    tokenizer.chat_template = None
    plain = PromptFormat(tokenizer, Prompt())
    assert plain.of([{"role": "user", "content": "a"}]) == "a\n\n" and plain.of("a") == "a"
    for settings, words in (
        (Prompt(format="chat"), "no chat template"),
        (Prompt(system="x"), "prompt.system is set"),
        (Prompt(template={"x": 1}), "prompt.template is set"),
    ):
        with pytest.raises(UserError, match=words):
            PromptFormat(tokenizer, settings)


def test_a_template_that_fails_on_a_system_message_is_a_sentence(gguf: Path) -> None:
    tokenizer = load_tokenizer(str(gguf))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    assert PromptFormat(tokenizer, Prompt()).text("hi") == "hi"
    with pytest.raises(UserError, match=r"no system role.*prompt\.system\): set it to null"):
        PromptFormat(tokenizer, Prompt(system="Be short."))


def test_arguments_reach_the_template(gguf: Path) -> None:
    tokenizer = load_tokenizer(str(gguf))
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if not thinking %}<think></think>{% endif %}"
    assert PromptFormat(tokenizer, Prompt(template={"thinking": False})).text("hi") == "hi<think></think>"
    assert PromptFormat(tokenizer, Prompt(template={"thinking": True})).text("hi") == "hi"
