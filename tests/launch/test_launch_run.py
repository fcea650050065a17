"""`cppo launch verl`: how a run is started, guarded and ended, and the data that are written for it. Without verl."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from cppo.cli import app as cli
from cppo.config.load import ConfigError, load_config
from cppo.errors import UserError
from cppo.launch import command
from cppo.launch import data as launch_data
from cppo.launch import verl as launch
from cppo.launch.settings import Cluster
from cppo.tasks import make_task

ACTOR = "actor_rollout_ref.actor"


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    """In an empty folder, and as on a machine without verl: the check has tests of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "config_folder", lambda: None)
    monkeypatch.delenv("VERL_USE_EXTERNAL_MODULES", raising=False)


# -- running ---------------------------------------------------------------------------------------------------------


def ready_to_run(monkeypatch, tmp_path, script: str, *arguments: str) -> launch.Plan:
    """A plan whose verl is a script (verl needs GPUs), with data files in place."""
    stub = tmp_path / "stub.py"
    stub.write_text(script)
    monkeypatch.setattr(command, "arguments", lambda settings: [str(stub), *map(str, settings)])
    monkeypatch.setattr(command, "check", lambda settings: command.Checked(version="0.9.1"))
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    for name in ("train", "AIME24", "AIME25", "AIME26"):
        (data / f"{name}.parquet").touch()
    return launch.plan("qwen3-8b-base", [*arguments, "output_dir=out"], Cluster(), data)


RECORD = """
import json, os, sys
names = ("VERL_USE_EXTERNAL_MODULES", "VERL_FILE_LOGGER_PATH", "PATH")
with open("seen.json", "w") as file:
    json.dump([sys.argv[1:], {name: os.environ.get(name) for name in names}], file)
sys.exit(3)
"""


def test_a_run_gets_the_command_and_gives_its_status(monkeypatch, tmp_path):
    said: list[str] = []
    ready = ready_to_run(monkeypatch, tmp_path, RECORD)
    assert launch.run(ready, say=said.append) == 3
    arguments, environment = json.loads(Path("seen.json").read_text())
    assert arguments == [str(entry) for entry in ready.settings.values()]
    assert environment["VERL_USE_EXTERNAL_MODULES"] == "cppo_verl_plugin"
    assert environment["VERL_FILE_LOGGER_PATH"] == str(tmp_path / "out" / "metrics.jsonl")
    assert environment["PATH"] == os.environ["PATH"]
    assert load_config(Path("out/config.yaml")) == ready.config
    assert Path("out/command.sh").read_text() == "#!/bin/sh\n" + ready.shell()
    assert str(tmp_path / "out") in said[0] and "status 3" in said[-1] and "--resume" in said[-1]
    ready = ready_to_run(monkeypatch, tmp_path, "")
    assert launch.run(ready, say=said.append) == 0 and "out/checkpoints" in said[-1]


def test_a_folder_with_a_checkpoint_is_gone_on_with_only_when_asked(monkeypatch, tmp_path):
    said: list[str] = []
    launch.run(ready_to_run(monkeypatch, tmp_path, ""), say=said.append)
    Path("out/metrics.jsonl").touch()
    launch.run(ready_to_run(monkeypatch, tmp_path, ""), say=said.append)  # no checkpoint: from the start
    Path("out/checkpoints").mkdir()
    Path("out/checkpoints/latest_checkpointed_iteration.txt").write_text("40")
    again = ready_to_run(monkeypatch, tmp_path, RECORD, "rule.delta=0.2")
    with pytest.raises(UserError, match=r"holds a run with a checkpoint of step 40.*--resume"):
        launch.run(again, say=said.append)
    assert not Path("seen.json").exists()
    said.clear()
    assert launch.run(again, resume=True, say=said.append) == 3
    assert said[0] == f"Going on from step 40. Changed since: {ACTOR}.policy_loss.rule.delta 0.15 -> 0.2."
    # verl would empty the file of the first part
    assert json.loads(Path("seen.json").read_text())[1]["VERL_FILE_LOGGER_PATH"].endswith("/metrics-2.jsonl")


def test_the_programs_status_is_verls(monkeypatch, tmp_path):
    ready_to_run(monkeypatch, tmp_path, "import sys; sys.exit(77)")
    words = ["launch", "verl", "--recipe", "qwen3-8b-base", "--data-dir", str(tmp_path / "data")]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 77 and "Error" not in done.stderr and "verl ended with status 77" in done.stderr


def test_modules_that_the_user_loads_into_verl_stay(monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "mine,cppo_verl_plugin")
    ready = launch.plan("qwen3-8b-base")
    assert ready.environment["VERL_USE_EXTERNAL_MODULES"] == "mine,cppo_verl_plugin"
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "mine")
    ready = launch.plan("qwen3-8b-base")
    assert ready.environment["VERL_USE_EXTERNAL_MODULES"] == "mine,cppo_verl_plugin"
    for_workers = ready.settings["ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES"]
    assert for_workers.value == "'mine,cppo_verl_plugin'"


def test_missing_data_stop_a_run_before_it_starts(monkeypatch, tmp_path):
    ready = ready_to_run(monkeypatch, tmp_path, RECORD)
    (tmp_path / "data" / "AIME25.parquet").unlink()
    with pytest.raises(UserError, match=r"there is no data file .*AIME25\.parquet\. Write them with `cppo launch"):
        launch.run(ready)
    assert not Path("out").exists() and not Path("seen.json").exists()
    elsewhere = ["data.train_files=[hdfs://x/a.parquet]", "data.val_files=[hdfs://x/b.parquet]"]
    assert launch.missing_files(ready_to_run(monkeypatch, tmp_path, "", *elsewhere)) is None


class Supervised:
    """`supervise` in a fork of this process (starting Python with torch takes seconds), a script as the run."""

    def __init__(self, script: str) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(writing, 1)
            try:
                os._exit(launch.supervise([sys.executable, "-uc", script], os.environ))
            finally:
                os._exit(99)
        os.close(writing)
        self.output = os.fdopen(reading)

    def status(self) -> int:
        self.output.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


COUNT = """
import signal, sys, time
seen = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda n, f: seen.append(n))
print("ready", flush=True)
while not seen: time.sleep(0.01)
time.sleep(0.3)
print(*map(int, seen), flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_run_once_and_its_status_comes_back(number):
    run = Supervised(COUNT)
    assert run.output.readline() == "ready\n"
    os.kill(run.pid, number)
    assert run.output.readline() == f"{int(number)}\n"
    assert run.status() == 7


def test_a_run_that_a_signal_ends_has_the_status_of_a_shell():
    assert Supervised("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)").status() == 128 + 9


def test_signals_reach_what_the_run_has_started():
    """As Ctrl-C in a terminal does: Ray's processes are children of verl's."""
    run = Supervised(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    grandchild = Path(f"/proc/{int(run.output.readline())}/status")
    os.kill(run.pid, signal.SIGTERM)
    assert run.status() == 128 + 15
    for _ in range(100):
        if not grandchild.exists() or "Z (zombie)" in grandchild.read_text():
            return
        time.sleep(0.05)
    pytest.fail("the run's own child is still alive")


# -- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Local files in the schemas of DAPO-Math-17k and AIME, and the settings that name them."""
    dapo = [{"prompt": [{"role": "user", "content": f"What is {i}+{i}?"}], "answer": str(2 * i)} for i in range(12)]
    (tmp_path / "dapo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dapo * 3))
    for year in (24, 25):
        rows = [{"problem": f"What is {i}+{i}?", "answer": 2 * i} for i in (year - 23, year + 100)]
        (tmp_path / f"aime{year}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    validation = "{AIME24: " + str(tmp_path / "aime24.jsonl") + ", AIME25: " + str(tmp_path / "aime25.jsonl") + "}"
    return [f"task.train={tmp_path / 'dapo.jsonl'}", f"task.validation={validation}"]


def test_data_are_written_as_verl_reads_them(data, tmp_path):
    done = CliRunner().invoke(cli.app, ["launch", "verl", "--recipe", "qwen3-8b-base", "--prepare-data", "d", *data])
    assert done.exit_code == 0, done.stderr
    assert "24 of 36 rows repeat a problem" in done.stdout and "2 problems are validation problems" in done.stdout
    assert "d/train.parquet: 10 problems" in done.stdout and "d/AIME25.parquet: 2 problems" in done.stdout
    rows = pyarrow.parquet.read_table("d/train.parquet").to_pylist()
    assert [row["extra_info"]["index"] for row in rows] == list(range(10))
    assert [row["reward_model"]["ground_truth"] for row in rows] == [str(2 * i) for i in (0, *range(3, 12))]
    content = rows[0]["prompt"][0]["content"]
    assert content.startswith("What is 0+0?") and "\\boxed" in content  # with the instruction, as `cppo train` asks
    assert {row["data_source"] for row in rows} == {"math"}
    assert {row["data_source"] for row in pyarrow.parquet.read_table("d/AIME24.parquet").to_pylist()} == {"AIME24"}
    about = json.loads(Path("d/data.json").read_text())
    assert about["problems"] == {"train.parquet": 10, "AIME24.parquet": 2, "AIME25.parquet": 2}
    assert sorted(path.name for path in Path("d").iterdir()) == sorted([*about["problems"], "data.json"])  # no rest
    # what is written is what `cppo train` would train on
    again = make_task("math", train="d/train.parquet", validation={"AIME24": "d/AIME24.parquet"})
    direct = make_task(
        "math", train=str(tmp_path / "dapo.jsonl"), validation={"AIME24": str(tmp_path / "aime24.jsonl")}
    )
    assert [e.prompt for e in again.validation()["AIME24"]] == [e.prompt for e in direct.validation()["AIME24"]]
    assert {e.answer for e in again.train(10, 0)} < {e.answer for e in direct.train(11, 0)}


def test_the_benchmarks_can_be_cut_short_and_bring_their_names_into_the_command(data):
    launch_data.prepare(load_config("qwen3-8b-base", [*data, "evaluation.problems=1"]), Path("d"))
    assert pyarrow.parquet.ParquetFile("d/AIME24.parquet").metadata.num_rows == 1
    ready = launch.plan("qwen3-8b-base", data, Cluster(), Path("d"))
    assert launch.missing_files(ready) is None
    files = ready.settings["data.val_files"].value or ""
    assert [Path(name).name for name in files.strip("[]").split(",")] == ["AIME24.parquet", "AIME25.parquet"]
    assert all(Path(name).is_absolute() for name in files.strip("[]").split(","))  # the same on every node


def test_bad_sources_leave_nothing_half_written(data, tmp_path):
    (tmp_path / "aime25.jsonl").write_text("{}\n")
    done = CliRunner().invoke(cli.app, ["launch", "verl", "--recipe", "qwen3-8b-base", "--prepare-data", "d", *data])
    assert done.exit_code == 2 and "has no prompt" in done.stderr and not Path("d").exists()
    with pytest.raises(UserError, match=r"task\.options\.train is not set"):
        launch_data.prepare(load_config("qwen3-8b-base", [data[1], "task.train=null"]), Path("d"))
    with pytest.raises(ConfigError):
        list(launch.prepare_data("qwen3-8b-base", ["task.nonsense=1", "steps=x"], Path("d")))
