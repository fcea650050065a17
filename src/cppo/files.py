"""Files that survive a kill, a power cut and a full disk.

A run folder is read again after whatever ended the run, so nothing in it may ever be half written:

* whole files (`atomic_write_*`) go to a temporary file in the same folder, are flushed to the disk and renamed over
  the old one; whoever reads sees the old content or the new, nothing between;
* folders (`atomic_folder`, for checkpoints) likewise, with `recover_folder` for a kill between the two renames that
  replacing a folder takes;
* growing files (`append_jsonl`) hold one JSON object per line. A line counts once its newline is on the disk: a torn
  last line is dropped on reading and cut off by the next append.

A full disk becomes a `DiskFullError`: a sentence that names the path and says that what was there before is intact.
Left out: locks. One process (the main one) writes a run folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cppo.errors import StopError, UserError

__all__ = [
    "DiskFullError",
    "append_jsonl",
    "atomic_folder",
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_text",
    "disk_full_as_sentence",
    "dumps",
    "fsync_folder",
    "jsonable",
    "read_jsonl",
    "recover_folder",
    "remove_temporaries",
    "truncate_after",
]

TEMPORARY_SUFFIX = ".cppo-tmp"
OLD_SUFFIX = ".cppo-old"

_FULL_ERRNOS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_FULL_ERRNOS[errno.EFBIG] = "the file would be larger than the limit on file sizes allows"
# safetensors (Rust) and torch.save (C++) raise their own exception types without an errno
_FULL_PHRASES = (
    "no space left on device",
    "storagefull",
    "disk quota exceeded",
    "file too large",
    "pytorchstreamwriter failed writing",
)


class DiskFullError(StopError, OSError):
    """There is no room for a file; `str()` is a sentence for the user, `filename` the path, `errno` the cause."""

    def __init__(self, path: str | os.PathLike[str], cause: BaseException):
        self.sentence = (
            f"Cannot write {os.fspath(path)}: {_why_full(cause) or cause}. What was there before is intact; "
            "free some space (or choose another output folder) and resume the run."
        )
        super().__init__(self.sentence)
        self.errno = getattr(cause, "errno", None) or errno.ENOSPC
        self.filename = os.fspath(path)

    def __str__(self) -> str:
        return self.sentence


def _why_full(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _FULL_ERRNOS:
        return _FULL_ERRNOS[error.errno]
    if any(phrase in str(error).lower() for phrase in _FULL_PHRASES):
        return f"there seems to be no space left ({type(error).__name__}: {error})"
    return None


@contextlib.contextmanager
def disk_full_as_sentence(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn any "no space" exception of the block (OSError, safetensors, torch.save) into `DiskFullError(path)`."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if _why_full(error) is None:
            raise
        raise DiskFullError(path, error) from error


def fsync_folder(folder: Path) -> None:
    """Wait until the entries of `folder`, renames among them, are on the disk."""
    # the rename itself is durable only when the folder's entry is; some file systems refuse to sync a folder
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # os.write may write less than it was given, e.g. up to the last free block
        view = view[os.write(handle, view) :]


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Replace the file `path` by `data`, or leave it as it was. Missing parent folders are made.

    Raises: DiskFullError (no space; the old file is intact), OSError for everything else (permissions ...).
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}"
    with disk_full_as_sentence(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _write_all(handle, data)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        fsync_folder(target.parent)
    return target


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """`atomic_write_bytes` of UTF-8 text. Lone surrogates (undecodable model output) are written as '?'."""
    return atomic_write_bytes(path, text.encode("utf-8", errors="replace"))


def jsonable(value: Any) -> Any:
    """`value` as plain JSON types: NaN and infinity become None, numpy / torch scalars numbers, paths strings."""
    if value is None or isinstance(value, bool | int | str):
        return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [jsonable(entry) for entry in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for method in ("item", "tolist"):  # 0-d tensors and numpy scalars; then whole arrays
        with contextlib.suppress(AttributeError, ValueError, RuntimeError, TypeError):
            return jsonable(getattr(value, method)())
    raise TypeError(
        f"A {type(value).__name__} ({value!r}) cannot be written as JSON; give numbers, text, lists or mappings."
    )


def dumps(value: Any, indent: int | None = None) -> str:
    """`value` as JSON text on one line (or indented); see `jsonable`."""
    return json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, indent=indent)


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """`value` as indented JSON (see `jsonable`), written atomically."""
    return atomic_write_text(path, dumps(value, indent=2) + "\n")


def append_jsonl(path: str | os.PathLike[str], *rows: Mapping[str, Any]) -> None:
    """Append `rows`, one JSON object per line, and wait until they are on the disk.

    A torn last line (a kill in an earlier append) is cut off first. When the disk is full the file is cut back to what
    it held before, so that its lines stay whole.  Raises: DiskFullError, TypeError (a value that is not JSON).
    """
    target = Path(path)
    data = "".join(dumps(row) + "\n" for row in rows).encode("utf-8", errors="replace")
    with disk_full_as_sentence(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        is_new = not target.exists()
        handle = os.open(target, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            end = _end_of_whole_lines(handle)
            if end < os.lseek(handle, 0, os.SEEK_END):
                os.ftruncate(handle, end)
            os.lseek(handle, end, os.SEEK_SET)
            try:
                _write_all(handle, data)
                os.fsync(handle)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)
        if is_new:
            fsync_folder(target.parent)


def _end_of_whole_lines(handle: int) -> int:
    """Offset after the last newline of the file."""
    end = os.lseek(handle, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        os.lseek(handle, start, os.SEEK_SET)
        at = os.read(handle, end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _whole_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every whole line with its parsed object; a torn or unreadable last line is dropped."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn, or empty
    rows: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if number == len(lines):  # after a power cut the last block may hold zeros, newline or not
                break
            raise UserError(
                f"Line {number} of {path} is not a JSON object ({error}); it was changed by something other than "
                "CPPO. Repair or delete that line."
            ) from error
        rows.append((line, row))
    return rows


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a JSONL file, without a torn last line; [] when there is no such file.

    Raises: ValueError naming the line when a line before the last is not a JSON object.
    """
    return [row for _, row in _whole_lines(Path(path))]


def truncate_after(
    path: str | os.PathLike[str], step: int, keep: Callable[[dict[str, Any]], bool] | None = None
) -> int:
    """Rewrite a JSONL file atomically with only the rows whose "step" is <= `step`; returns how many were dropped.

    Kept lines keep their bytes. `keep` (row -> bool) names rows that stay whatever their step, e.g. warm-up rows, which
    count steps of their own. A missing file is left missing.
    """
    target = Path(path)
    if not target.exists():
        return 0
    rows = _whole_lines(target)
    kept = [line for line, row in rows if int(row.get("step", 0)) <= step or (keep is not None and keep(row))]
    content = b"".join(line + b"\n" for line in kept)
    if content != target.read_bytes():
        atomic_write_bytes(target, content)
    return len(rows) - len(kept)


def _old(path: Path) -> Path:
    return path.parent / f".{path.name}{OLD_SUFFIX}"


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`with atomic_folder(target) as temporary:` write into `temporary`; on success it becomes `target`.

    On any exception the temporary folder is removed and `target` is what it was. An existing `target` is replaced with
    two renames; call `recover_folder(target)` when a run starts, for a kill between them.
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}"
    with disk_full_as_sentence(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(target)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    with open(file, "rb") as stream:
                        os.fsync(stream.fileno())
            for folder in (*(entry for entry in temporary.rglob("*") if entry.is_dir()), temporary):
                fsync_folder(folder)
            if target.exists():
                os.replace(target, _old(target))
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            recover_folder(target)
            raise
        fsync_folder(target.parent)
        shutil.rmtree(_old(target), ignore_errors=True)


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Undo a replacement of the folder `path` that a kill stopped half way; drops the old one of a finished one."""
    target = Path(path)
    old = _old(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, target)


def remove_temporaries(folder: str | os.PathLike[str]) -> None:
    """Delete what killed writes left under `folder` (all levels), after recovering half-replaced folders."""
    root = Path(folder)
    for old in list(root.rglob(f".*{OLD_SUFFIX}")):
        recover_folder(old.parent / old.name[1 : -len(OLD_SUFFIX)])
    for entry in list(root.rglob(f".*{TEMPORARY_SUFFIX}")):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                entry.unlink()


def rounded(value: float, digits: int = 6) -> float | None:
    """`value` to `digits` significant digits (a third of the bytes in a file); None for NaN and infinity."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
