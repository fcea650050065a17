"""What a user can put right is one sentence with status 2, from every command; a fault of ours is a traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cppo.cli import app as cli
from cppo.config.load import load_config
from cppo.errors import StopError, UserError
from cppo.files import DiskFullError
from cppo.runs.folder import RunFolder
from cppo.study import warmup
from cppo.study.store import STUDY_FILE
from cppo.tokens import TokenBatch
from cppo.training.callbacks import NonFiniteError

SRC = Path(__file__).parents[2] / "src" / "cppo"

MISTAKES = {
    "train: no recipe": (["train", "arithmetics"], "no recipe"),
    "train: a value": (["train", "delta=-1"], "delta is -1"),
    "train: a key": (["train", "deltaa=1"], "deltaa"),
    "train: a task": (["train", "task=reasoning_gym:chain_summ"], "no generator 'chain_summ'"),
    "train: a task's option": (["train", "task.families=[chain-x]"], "chain-x"),
    "train: data": (["train", "task=math", "task.options.train=no.parquet", "model=x"], "there is no file no.parquet"),
    "train: a module without the name": (["train", "task=json:Nothing"], "json"),
    "train: resume": (["train", "--resume", "nowhere"], "there is no run"),
    "evaluate: a folder": (["evaluate", "./nowhere"], "there is no folder"),
    "rules: a name": (["rules", "cpo"], "no rule 'cpo'"),
    "bound: a rule": (["bound", "--horizon", "8", "--rule", "cpo"], "no rule 'cpo'"),
    "bound: a number": (["bound", "--horizon", "8", "--delta", "-1"], "delta is -1"),
    "bound: a schedule": (["bound", "--horizon", "8", "--schedule", "liner"], "liner"),
    "bound: a run": (["bound", "--run", "nowhere"], "there is no run"),
    "compare: a rule": (["compare", "--rules", "cpo,dppo"], "cpo"),
    "ablate: a suite": (["ablate", "--only", "mechanism"], "mechanism"),
    "inspect: no dump": (["inspect", "nowhere.jsonl"], "nowhere.jsonl"),
    "inspect: a rule": (["inspect", "{dump}", "--rule", "cpo"], "no rule 'cpo'"),
    "inspect: a parameter": (["inspect", "{dump}", "--set", "cppo.delta=-1"], "delta is -1"),
    "inspect: a setting": (["inspect", "{dump}", "--set", "delta=1"], "expected RULE.PARAMETER=VALUE"),
    "calibrate: a rule": (["calibrate", "{dump}", "--rule", "cpo"], "no rule 'cpo'"),
    "calibrate: a parameter": (["calibrate", "{dump}", "--rule", "dppo", "--set", "dppo.delt=1"], "delt"),
    "calibrate: a target": (["calibrate", "{dump}", "--target", "2"], "target"),
    "report: nothing": (["report", "nowhere"], "nothing at nowhere"),
    "compare: a broken plan": (["compare", "--show", "{study}"], "study.yaml, line 1"),
    "ablate: a broken plan": (["ablate", "--show", "{study}"], "study.yaml, line 1"),
    "report: a broken plan": (["report", "{study}"], "study.yaml, line 1"),
    "report: a broken log": (["report", "{broken}"], "config"),
    "launch: a recipe": (["launch", "verl", "--recipe", "qwen"], "qwen"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    rows = [
        f'{{"rollout_logp": [-1.0, -1.1, -0.5], "policy_logp": [{-1.0 + 0.1 * i}, -1.0, -0.6], "advantage": {i - 1}}}'
        for i in range(4)
    ]
    (tmp_path / "dump.jsonl").write_text("\n".join(rows) + "\n")
    broken = RunFolder(tmp_path / "broken")
    broken.path.mkdir()
    broken.config_file.write_text("- this\n- is a list\n")
    study = tmp_path / "study" / STUDY_FILE
    study.parent.mkdir()
    study.write_text("kind: [")
    return tmp_path


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_sentence(name: str, here: Path) -> None:
    words, said = MISTAKES[name]
    places = {"{dump}": str(here / "dump.jsonl"), "{broken}": str(here / "broken"), "{study}": str(here / "study")}
    done = CliRunner().invoke(cli.app, [places.get(word, word) for word in words])
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stderr.startswith("Error: ") and said in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_shape_of_our_own_is_a_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TokenBatch raises ValueError for its caller, which here is the program itself."""

    def packed(self: object, divergence: object = None) -> TokenBatch:
        return TokenBatch(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), torch.ones(2, 3))

    monkeypatch.setattr("cppo.dumps.dump.Dump.packed", packed)
    done = CliRunner().invoke(cli.app, ["inspect", "dump.jsonl"])
    assert isinstance(done.exception, ValueError) and not isinstance(done.exception, UserError)
    assert done.exit_code == 1 and "Error:" not in done.stderr


def _warm_up_that_raises(error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    def warm_up(self: object) -> Path:
        raise error

    monkeypatch.setattr(warmup.Run, "warm_up", warm_up)
    settings = folder / "settings.yaml"
    settings.write_text(load_config(None, [f"output_dir={folder / 'shared'}"]).to_yaml())
    return warmup.main(settings)


def test_the_shared_warm_up_of_a_study_speaks_likewise(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _warm_up_that_raises(UserError("no demonstrations"), here, monkeypatch) == 2
    assert _warm_up_that_raises(NonFiniteError("ten in a row"), here, monkeypatch) == 1
    said = capsys.readouterr().err
    assert "Error: no demonstrations" in said and "Error: ten in a row" in said
    with pytest.raises(ValueError, match="a wrong shape"):
        _warm_up_that_raises(ValueError("a wrong shape"), here, monkeypatch)


def test_a_run_that_had_to_stop_is_no_mistake() -> None:
    assert issubclass(DiskFullError, StopError) and issubclass(NonFiniteError, StopError)
    assert not issubclass(StopError, UserError)


def test_names_of_a_run_folder_are_spelled_once() -> None:
    """Every file name is `RunFolder`'s (config.yaml: `config.yaml_io`, for the settings stand below the folder)."""
    names = (
        r'"(config\.yaml|(metrics|positions|certificates|problems)\.jsonl|(calibration|versions)\.json|summary\.md)"'
    )
    spelled = {
        str(path.relative_to(SRC)) for path in SRC.rglob("*.py") if re.search(names, path.read_text(encoding="utf-8"))
    }
    assert spelled == {"runs/folder.py", "config/yaml_io.py"}


def test_a_summary_reads_settings_as_they_were_written(tmp_path: Path) -> None:
    """YAML 1.1 would make `name: on` a True."""
    from cppo.runs.summary import write_summary

    run = RunFolder(tmp_path)
    run.config_file.write_text(load_config(None, ["model=on"]).to_yaml())
    assert run.config()["model"] == "on"
    assert "| model | on |" in write_summary(tmp_path)
