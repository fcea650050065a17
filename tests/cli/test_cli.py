"""The program from outside: what it prints, where, and its exit status. Whole runs are in tests/training."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cppo
from cppo.cli import app as cli
from cppo.cli import common, train
from cppo.config.load import load_config
from cppo.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def program(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "cppo.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120, check=False)


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """The program in this process, in an empty folder (starting Python with torch takes seconds)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(cli.app, list(arguments))


def test_a_mistake_is_one_sentence_on_stderr_with_status_2():
    done = program("train", "delta=oops")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "Error: rule.delta is 'oops', expected a number above 0.\n"


def test_debug_shows_the_traceback_wherever_it_stands():
    done = program("train", "delta=oops", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ConfigError" in done.stderr


def test_mistakes_are_found_before_training_libraries_are_imported():
    code = "from typer.testing import CliRunner\nfrom cppo.cli import app as cli\n"
    code += "run = lambda *words: CliRunner().invoke(cli.app, list(words)).exit_code\n"
    code += "assert (run('train', 'delta=oops'), run('rules')) == (2, 0)"
    assert loaded_after(code, "transformers", "trl", "datasets", "accelerate") == []


def loaded_after(code: str, *names: str) -> list[str]:
    """Which of the modules are imported after the code, in a process of its own."""
    code = f"import sys\n{code}\nprint(*(name for name in {names} if name in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines()[-1].split()


def test_the_program_starts_without_heavy_libraries():
    assert loaded_after("import cppo.cli.app", "torch", "pydantic", "matplotlib", "scipy", "cppo.rules") == []
    called = "from typer.testing import CliRunner\nfrom cppo.cli.app import app\n"
    called += "assert CliRunner().invoke(app, ['report', '--help']).exit_code == 0"
    assert loaded_after(called, "torch", "accelerate", "matplotlib") == []


def test_version(invoke):
    done = invoke("--version")
    assert (done.exit_code, done.stdout) == (0, f"cppo {cppo.__version__}\n")


def test_rules_lists_every_rule_with_parameters_and_source(invoke):
    done = invoke("rules")
    assert done.exit_code == 0
    text = " ".join(done.stdout.replace("│", " ").split())
    for name, rule in cppo.RULES.items():
        assert name in text and rule.source.split()[0] in text
    assert "delta_avg=0.002" in text and "w_min=0.8" in text and "gate=null" in text


@pytest.mark.parametrize("name", list(cppo.RULES))
def test_one_rule_shows_its_formula(invoke, name):
    done = invoke("rules", name)
    assert done.exit_code == 0
    assert cppo.RULES[name].source in done.stdout
    assert (cppo.RULES[name].__doc__ or "").strip().splitlines()[0] in done.stdout


def test_recipes(invoke):
    done = invoke("recipes")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in ("arithmetic", "qwen3-1.7b", "qwen3-30b-a3b-base"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["rules", "dpo"], ["no rule 'dpo'", "Did you mean 'dppo'?"]),
        (["train", "arithmetik"], ["no recipe 'arithmetik'", "Did you mean 'arithmetic'?"]),
        (["train", "a", "b"], ["expected one recipe, got a, b"]),
        (["train", "missing.yaml", "steps=2"], ["no recipe 'missing.yaml'"]),
        (["train", "--resume", "nowhere"], ["--resume nowhere: there is no run"]),
        (["train", "steps=3", "--resume", "nowhere"], ["takes no others (got steps=3)"]),
        (["train", "deltaa=3", "steps=x"], ["2 problems", "rule.delta", "steps is 'x'"]),
        (["train", "task.familes=[a]"], ["families"]),
        (["evaluate", "./nowhere"], ["there is no folder ./nowhere"]),
        (["evaluate", "model", "x"], ["'x' is not a setting", "--recipe x"]),
        (["evaluate", "steps=3"], ["expected a model first"]),
        (["evaluate", ".", "evaluation.samples=0"], ["evaluation.samples is 0"]),
        (["evaluate", ".", "--recipe", "arithmetik"], ["Did you mean 'arithmetic'?"]),
        (["bound"], ["give --horizon T", "or --run RUN"]),
        (["bound", "--horizon", "0"], ["horizon is 0, expected at least 1 token"]),
        (["bound", "--horizon", "9", "--delta", "1.5"], ["delta is 1.5", "at most 1"]),
        (["bound", "--horizon", "9", "--w-min", "0"], ["w_min is 0.0"]),
        (["bound", "--horizon", "9", "--rule", "dpo"], ["no rule 'dpo'", "Did you mean 'dppo'?"]),
        (["bound", "--horizon", "9", "--schedule", "stairs"], ["schedule is 'stairs'", "linear"]),
        (["bound", "--run", "nowhere"], ["--run nowhere: there is no run"]),
        (["compare", "--rules", "dpo"], ["--rules names 'dpo'", "Did you mean 'dppo'?"]),
        (["compare", "--seeds", "0"], ["--seeds is 0, expected at least 1"]),
        (["compare", "--resume", "nowhere"], ["nowhere: there is no study"]),
        (["compare", "seed=3"], ["in a study seed is given by --seeds"]),
        (["inspect", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["inspect", "nowhere.jsonl", "--rule", "dpo"], ["no rule 'dpo'"]),
        (["calibrate", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["calibrate", "nowhere.jsonl", "--budget", "x"], ["--budget is 'x', expected adaptive or fixed"]),
        (["trian"], ["No such command 'trian'"]),
        (["train", "--bogus"], ["No such option"]),
    ],
)
def test_mistakes(invoke, arguments, words):
    done = invoke(*arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_bound_prints_every_rule_beside_the_uniform_one(invoke):
    done = invoke("bound", "--horizon", "8192", "--delta", "0.15", "--delta-b", "0.02", "--w-min", "0.8", "--schedules")
    assert done.exit_code == 0
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in done.stdout.splitlines() if "│" in line]
    bounds = {(row[0], row[1]): row[3:] for row in rows if len(row) == 5}
    assert bounds["dppo", "uniform (Sec. 3)"] == ["1,509,765", "1"]
    assert bounds["cppo", "Theorem 1, Cor. 7"] == ["251,628", "0.1667"]
    assert {rule for rule, _ in bounds} >= set(cppo.RULES)
    conditions = {row[0]: row[1] for row in rows if len(row) == 2}
    assert list(conditions.values()) == ["holds", "does not hold", "holds"]
    assert {row[0] for row in rows if len(row) == 8} >= {"constant", "linear", "reversed"}


def test_bound_as_json_and_for_one_rule(invoke):
    done = invoke("bound", "--horizon", "64", "--delta-b", "0.14", "--rule", "cppo", "--rule", "dppo", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and {row["rule"] for row in found["constants"]} == {"cppo", "dppo"}
    by_statement = {row["statement"]: row for row in found["constants"]}
    # delta_b >= delta w_min: CPPO's constant is above the uniform rule's
    ratio = by_statement["Theorem 1, Cor. 7"]["ratio"]
    assert ratio == pytest.approx(0.14 / (0.15 * 0.8)) and ratio > 1
    assert found["horizon"] == 64 and sorted(found["conditions"].values()) == [False, False, True]


def test_bound_of_a_run(invoke):
    Path("runs/one").mkdir(parents=True)
    Path("runs/one/config.yaml").write_text("steps: 2\n")
    assert "has no certificates" in invoke("bound", "--run", "runs/one").stderr
    names = ("surrogate", "ratios", "improvement", "pathwise", "product", "prop4")
    numbers = {f"{name}{end}": 0.25 for name in names for end in ("", "_low", "_high")}
    row = {"responses": 32, "horizon": 40, "xi": 0.5, "divergence": "topk_tv", "certified": False, **numbers}
    lines = [json.dumps({"step": step, **row}) for step in range(1, 41)]
    Path("runs/one/certificates.jsonl").write_text("\n".join(lines) + "\n")
    done = invoke("bound", "--run", "runs/one")
    assert done.exit_code == 0 and "0.25 [0.25, 0.25]" in done.stdout
    assert "In 40 of 40 steps" in done.stdout and "a lower bound of the exact divergence" in done.stdout
    shown = [line for line in done.stdout.splitlines() if "[0.25, 0.25]" in line]
    assert len(shown) <= 17 and shown[-1].split("│")[1].strip() == "40"
    assert len(json.loads(invoke("bound", "--run", "runs/one", "--json").stdout)) == 40


def test_inspect_and_calibrate_a_dump(invoke):
    number = random.Random(0).random
    lines = [
        {
            "rollout_logp": [-0.2 - number() for _ in range(12)],
            "policy_logp": [-0.2 - number() for _ in range(12)],
            "advantage": (-1.0) ** i,
            "reward": i % 2,
            "group": i // 4,
        }
        for i in range(40)
    ]
    Path("dump.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = invoke("inspect", "dump.jsonl", "--rule", "cppo", "--rule", "dppo", "--set", "dppo.delta=0.1", "--out", "x")
    assert done.exit_code == 0 and "binary_tv" in done.stdout, done.stderr
    assert Path("x/inspect.json").exists() and list(Path("x").glob("*.svg"))
    report = json.loads(invoke("inspect", "dump.jsonl", "--json").stdout)
    assert set(report["rules"]) == set(cppo.RULES) and report["dump"]["loss_tokens"] == 480
    found = json.loads(invoke("calibrate", "dump.jsonl", "--target", "0.1", "--json").stdout)
    translation, rules = found["translation"], found["rules"]
    assert translation["divergence"] == "binary_tv" and set(translation["limits"]) == {"binary_tv", "binary_kl"}
    assert rules["cppo"]["share"] == pytest.approx(0.1, abs=2 / 480)
    given = f"dppo.delta={rules['dppo']['thresholds']['delta']}"
    dppo = json.loads(invoke("inspect", "dump.jsonl", "--rule", "dppo", "--set", given, "--json").stdout)
    assert dppo["rules"]["dppo"]["masked"] == pytest.approx(48 / 480)
    shown = invoke("calibrate", "dump.jsonl", "--target", "0.1").stdout
    assert "Limits that drop as much as binary_tv" in shown and "eps_high" in shown


def test_missing_runs_name_the_newest_that_there_is(invoke):
    Path("runs/one").mkdir(parents=True)
    Path("runs/one/config.yaml").write_text("steps: 2\n")
    assert f"The newest run there is {Path('runs/one')}." in invoke("train", "--resume", "runs/two").stderr


def test_markup_in_what_the_user_typed_is_shown_as_typed(invoke):
    assert "no recipe '[red]x[/red]'" in invoke("train", "[red]x[/red]").stderr


@pytest.mark.parametrize(
    "raised, status, text",
    [
        (KeyboardInterrupt("Stopped. Nothing is lost."), 130, "Stopped. Nothing is lost.\n"),
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (UserError("wrong [x]."), 2, "Error: wrong [x].\n"),
    ],
)
def test_exit_status(capsys, raised, status, text):
    @common.sentences
    def command() -> None:
        raise raised

    with pytest.raises(cli.typer.Exit) as caught:
        command()
    assert caught.value.exit_code == status
    assert capsys.readouterr().err == text


def test_faults_of_the_program_keep_their_traceback():
    @common.sentences
    def command() -> None:
        int("x")

    with pytest.raises(ValueError, match="invalid literal"):
        command()


def test_arguments_are_told_apart_by_the_equals_sign():
    assert common.split_arguments(["delta=1", "my.yaml", "steps=2"]) == ("my.yaml", ["delta=1", "steps=2"])
    assert common.split_arguments(["steps=2"]) == (None, ["steps=2"])


def test_a_model_in_a_run_brings_the_settings_of_the_run(tmp_path):
    run = tmp_path / "run"
    for folder in ("checkpoints/step-000004", "checkpoints/step-000010"):
        (run / folder).mkdir(parents=True)
        (run / folder / "config.json").write_text("{}")
    (run / "config.yaml").write_text(load_config(None, ["steps=10"]).to_yaml())
    assert train.locate(str(run)) == (str(run / "checkpoints/step-000010"), run / "config.yaml")
    (run / "best/step-000004").mkdir(parents=True)
    assert train.locate(str(run)) == (str(run / "best/step-000004"), run / "config.yaml")
    assert train.locate(str(run / "checkpoints/step-000004"))[1] == run / "config.yaml"
    assert train.locate("Qwen/Qwen3-1.7B") == ("Qwen/Qwen3-1.7B", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_text("steps: 2\n")
    with pytest.raises(UserError, match="has no policy yet"):
        train.locate(str(tmp_path / "empty"))


def test_the_table_of_an_evaluation():
    from rich.console import Console

    row = {
        "samples": 16,
        "avg/a": 0.25,
        "pass/a": 0.5,
        "avg/b": 0.75,
        "pass/b": 1.0,
        "avg/mean": 0.5,
        "pass/mean": 0.75,
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(train.evaluation_table("model", json.loads(json.dumps(row))))
    text = console.export_text()
    assert "Avg@16" in text and "pass@16" in text
    lines = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["a", "0.250", "0.500"] in lines and ["b", "0.750", "1.000"] in lines and ["mean", "0.500", "0.750"] in lines
