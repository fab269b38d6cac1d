"""Every write, sync, truncation, renaming and removal of a real process, in order: recorded with strace.

What the writers believe they make durable is not asked; the system calls say it.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

CALLS = (
    "openat", "pwrite64", "write", "fsync", "fdatasync", "ftruncate", "unlink", "unlinkat", "rename", "renameat",
    "renameat2",
)
UNREADABLE = ("pwritev", "pwritev2", "writev", "truncate", "fallocate", "copy_file_range", "sync_file_range")
"""Calls that would change a file, too, and that none of our writers makes. One of them fails the recording."""

TEXT_BYTES_MAX = 1 << 25  # of one write
RECORDING_S_MAX = 300.0
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_FILE = re.compile(r"^\d+<((?:\\x[0-9a-f]{2})*)>")
_CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)", re.DOTALL)
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)", re.DOTALL)


class Operation(NamedTuple):
    """One call that succeeded. ``kind`` is write, truncate, sync, remove, rename or acknowledge.

    ``path`` is relative to the recorded directory, empty for the directory itself. ``offset`` is None for a write at
    the end; for a truncation it is the new size. ``began`` counts the operations that were complete when it began:
    a sync promises nothing of what was written while it ran. ``target`` is the new name.
    """

    kind: str
    path: str
    began: int
    offset: int | None = None
    data: bytes = b""
    target: str = ""


def record(directory: Path, trace: Path) -> list[Operation]:
    """Run the workload in the directory under strace; what it did to the files there."""
    command = ["strace", "-f", "--seccomp-bpf", "-y", "-xx", "-s", str(TEXT_BYTES_MAX), "-o", str(trace)]
    command += ["-e", f"trace={','.join(CALLS + UNREADABLE)}", sys.executable, "-m", "tests.faults.power.workload"]
    done = subprocess.run(
        [*command, str(directory)], capture_output=True, text=True, timeout=RECORDING_S_MAX, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with trace.open(encoding="ascii", errors="replace") as lines:
        return list(operations(lines, str(directory)))


def operations(lines: Iterable[str], directory: str) -> Iterator[Operation]:
    """Read strace's output. A call is complete where its result stands."""
    unfinished: dict[str, tuple[str, int]] = {}
    count = 0
    for line in lines:
        process, _, text = line.partition(" ")
        text = text.strip()
        began = count
        if text.endswith("<unfinished ...>"):
            unfinished[process] = text.removesuffix("<unfinished ...>").rstrip(), count
            continue
        if resumed := _RESUMED.match(text):
            before, began = unfinished.pop(process)
            text = before + resumed.group(1)
        call = _CALL.match(text)
        if call is None or int(call.group(3)) < 0:
            continue
        found = _operation(call.group(1), call.group(2), int(call.group(3)), directory, began)
        if found is not None:
            count += 1
            yield found


def _operation(call: str, arguments: str, result: int, directory: str, began: int) -> Operation | None:
    texts = [bytes.fromhex(text.replace("\\x", "")) for text in _TEXT.findall(arguments)]
    opened = _FILE.match(arguments)
    name = bytes.fromhex(opened.group(1).replace("\\x", "")) if opened else texts[0] if texts else b""
    path = _below(directory, name.decode(errors="replace"))
    if call == "openat":
        path = _below(directory, texts[0].decode(errors="replace"))
        return None if path is None or "O_TRUNC" not in arguments else Operation("truncate", path, began, 0)
    if path is None or path.endswith("-shm"):  # an index in memory; SQLite makes it again
        return None
    assert call not in UNREADABLE, f"{call} on {path} is not understood here"
    if path == "acknowledged":
        return Operation("acknowledge", path, began, data=texts[0])
    if call in ("write", "pwrite64"):
        offset = int(arguments.rpartition(",")[2]) if call == "pwrite64" else None
        return Operation("write", path, began, offset, texts[0][:result])
    if call in ("fsync", "fdatasync"):
        return Operation("sync", path, began)
    if call == "ftruncate":
        return Operation("truncate", path, began, int(arguments.rpartition(",")[2]))
    names = [_below(directory, text.decode()) or "" for text in texts]
    return Operation("remove" if call.startswith("unlink") else "rename", names[0], began, target=names[-1])


def _below(directory: str, path: str) -> str | None:
    if path == directory:
        return ""
    return path.removeprefix(f"{directory}/") if path.startswith(f"{directory}/") else None
