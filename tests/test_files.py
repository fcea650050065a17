"""Files survive kills, torn lines and full disks."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cppo import files

SRC = Path(__file__).parents[1] / "src"


def start(code: str, *args: str) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(SRC)}
    return subprocess.Popen([sys.executable, "-c", code, *args], env=env, stderr=subprocess.PIPE)


def kill_while_writing(process: subprocess.Popen[bytes], path: Path, seconds: float) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
        time.sleep(0.01)
    time.sleep(seconds)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_atomic_write_makes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    files.atomic_write_text(path, "one\u00e9")
    assert files.atomic_write_text(path, "two \ud800") == path
    assert path.read_text() == "two ?"
    files.atomic_write_json(path, {"x": float("nan"), "y": [np.float32(1.5), torch.tensor(2)], "z": Path("p")})
    assert json.loads(path.read_text()) == {"x": None, "y": [1.5, 2], "z": "p"}
    assert os.listdir(path.parent) == ["b.txt"]


def test_what_is_not_json_is_a_sentence() -> None:
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        files.dumps({"x": object()})
    assert files.dumps({"t": torch.ones(2, 1), "inf": float("inf"), "b": True}) == (
        '{"t": [[1.0], [1.0]], "inf": null, "b": true}'
    )


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.2])
def test_kill_in_atomic_write_leaves_old_or_new(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "file"
    code = (
        "import sys; from cppo.files import atomic_write_bytes\n"
        "i = 0\n"
        "while True:\n    i += 1; atomic_write_bytes(sys.argv[1], bytes([i % 256]) * 3_000_000)"
    )
    kill_while_writing(start(code, str(path)), path, seconds)
    data = path.read_bytes()
    assert len(data) == 3_000_000 and len(set(data)) == 1
    files.remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.2])
def test_kill_in_append_leaves_whole_lines(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from cppo.files import append_jsonl\n"
        "i = 0\n"
        "while True:\n    append_jsonl(sys.argv[1], {'step': i, 'x': 'y' * 500_000}); i += 1"
    )
    kill_while_writing(start(code, str(path)), path, seconds)
    rows = files.read_jsonl(path)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    files.append_jsonl(path, {"step": len(rows)})
    assert [row["step"] for row in files.read_jsonl(path)] == list(range(len(rows) + 1))
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}', b"\0\0\0\0", b"x" * 70_000])
def test_torn_last_line_is_dropped_and_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    files.append_jsonl(path, {"step": 1}, {"step": 2})
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [row["step"] for row in files.read_jsonl(path)] == [1, 2]
    files.append_jsonl(path, {"step": 3, "again": True})
    assert path.read_bytes() == whole + b'{"step": 3, "again": true}\n'
    path.write_bytes(torn)
    files.append_jsonl(path, {"step": 1})
    assert files.read_jsonl(path) == [{"step": 1}]


def test_unreadable_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert files.read_jsonl(path) == []
    path.write_text('{"step": 1}\n{"ste\n')
    assert files.read_jsonl(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*rows\.jsonl is not a JSON object"):
        files.read_jsonl(path)


def test_truncate_after_keeps_exactly_rows_up_to_step(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert files.truncate_after(path, 3) == 0 and not path.exists()
    for step in range(6):
        files.append_jsonl(path, {"step": step, "update": 0}, {"step": step, "update": 1, "x": 0.1 + 0.2})
    lines = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as stream:
        stream.write(b'{"step": 2, "to')
    assert files.truncate_after(path, 3) == 4
    assert path.read_bytes() == b"".join(lines[:8])
    assert files.truncate_after(path, 3) == 0
    assert files.truncate_after(path, 0, keep=lambda row: row["step"] == 2) == 4
    assert [row["step"] for row in files.read_jsonl(path)] == [0, 0, 2, 2]


FULL = """
import resource, signal, sys
from cppo import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for write in (
    lambda: files.atomic_write_bytes(sys.argv[1], b"n" * 20_000),
    lambda: files.append_jsonl(sys.argv[2], {"step": 2}, {"step": 3, "x": "y" * 20_000}),
):
    try:
        write()
    except files.DiskFullError as error:
        print(error, file=sys.stderr)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
def test_no_space_leaves_what_was_there(tmp_path: Path) -> None:
    whole, rows = tmp_path / "best.bin", tmp_path / "rows.jsonl"
    files.atomic_write_bytes(whole, b"old")
    files.append_jsonl(rows, {"step": 1})
    process = start(FULL, str(whole), str(rows))
    message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 0, message
    for path in (whole, rows):
        assert f"Cannot write {path}: " in message
    assert message.count("What was there before is intact") == 2
    assert whole.read_bytes() == b"old" and files.read_jsonl(rows) == [{"step": 1}]
    assert rows.read_text() == '{"step": 1}\n'
    assert sorted(os.listdir(tmp_path)) == ["best.bin", "rows.jsonl"]


def test_full_disk_sentence_for_all_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    causes = [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # safetensors
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed"),
    ]
    for cause in causes:
        with pytest.raises(files.DiskFullError) as caught, files.disk_full_as_sentence(path):
            raise cause
        assert str(caught.value).startswith(f"Cannot write {path}: ") and caught.value.filename == str(path)
        assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT)
    with pytest.raises(PermissionError), files.disk_full_as_sentence(path):
        raise PermissionError(errno.EACCES, "no")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files.atomic_write_text(path, "old")
    monkeypatch.setattr(os, "fsync", full)  # space may run out as late as here
    with pytest.raises(files.DiskFullError, match="the disk is full"):
        files.atomic_write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_dev_full() -> None:
    with pytest.raises(files.DiskFullError, match="Cannot write /dev/full: the disk is full"):
        files.append_jsonl("/dev/full", {"step": 1})


def test_atomic_folder(tmp_path: Path) -> None:
    target = tmp_path / "best"
    for content in ("one", "two"):
        with files.atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / content).write_text(content)

    def save_half() -> None:
        with files.atomic_folder(target) as folder:
            (folder / "half").write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(files.DiskFullError, match="best"):
        save_half()
    assert os.listdir(tmp_path) == ["best"] and os.listdir(target / "sub") == ["two"]


def test_folder_recovers_from_a_kill_between_the_renames(tmp_path: Path) -> None:
    target, old = tmp_path / "best", tmp_path / ".best.cppo-old"
    old.mkdir()
    (old / "model").write_text("old")
    (tmp_path / ".best.123.cppo-tmp").mkdir()
    files.remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["best"] and (target / "model").read_text() == "old"
    old.mkdir()  # killed after the second rename: the new one is there
    files.recover_folder(target)
    assert os.listdir(tmp_path) == ["best"]
