"""A disk that loses its power: what may be on it afterwards, given everything that was done to it.

A write is certain once a sync of its file that began after it returned. Until then it may be there, or not, or in
part: a sector of 512 bytes is whole, nothing larger is. Names (made, changed and removed files) come one after the
other, as a journaling file system keeps them: any number of those after the last sync, of whatever file, are there.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.faults.power.recording import Operation

SECTOR_BYTES = 512
TORN_SHARE = 0.4  # of the writes that arrive
KINDS = ("killed", "synced only", "in order", "any")
"""Everything written arrived; only what is certain; all up to one write, which is torn; any of them, any torn."""

Files = dict[str, bytes]


class Crash(NamedTuple):
    """Files as they may be found, what was acknowledged before, and at which operation the power went."""

    kind: str
    at: int
    files: Files
    acknowledged: dict[str, int]


class File:
    """Content as processes see it, content that is certain, and the writes between, each with its place in time."""

    def __init__(self) -> None:
        self.seen, self.certain = bytearray(), bytearray()
        self.pending: list[tuple[int, Operation]] = []

    def do(self, at: int, operation: Operation) -> None:
        """A write or a truncation."""
        if operation.offset is None:
            operation = operation._replace(offset=len(self.seen))
        self.pending.append((at, operation))
        _apply(self.seen, operation)

    def sync(self, began: int) -> None:
        """What was done before it began is certain."""
        for _, operation in [each for each in self.pending if each[0] < began]:
            _apply(self.certain, operation)
        self.pending = [each for each in self.pending if each[0] >= began]


class Disk:
    """Follows a recording."""

    def __init__(self) -> None:
        self._names: dict[str, File] = {}
        self._certain_names: dict[str, File] = {}
        self._renamings: list[tuple[int, dict[str, File]]] = []  # the names after each change that is not certain
        self.acknowledged: dict[str, int] = {}

    def do(self, at: int, operation: Operation) -> None:
        """The next operation."""
        if operation.kind == "acknowledge":
            stream, _, end = operation.data.decode().partition(" ")
            self.acknowledged[stream] = int(end)
        elif operation.kind == "sync":
            self._sync(operation)
        elif operation.kind in ("remove", "rename"):
            moved = self._names.pop(operation.path, None)
            if operation.kind == "rename" and moved is not None:
                self._names[operation.target] = moved
            self._renamings.append((at, dict(self._names)))
        else:
            if operation.path not in self._names:
                self._names[operation.path] = File()
                self._renamings.append((at, dict(self._names)))
            self._names[operation.path].do(at, operation)

    def _sync(self, operation: Operation) -> None:
        if operation.path in self._names:
            self._names[operation.path].sync(operation.began)
        while self._renamings and self._renamings[0][0] < operation.began:
            self._certain_names = self._renamings.pop(0)[1]

    def seen(self) -> Files:
        """What a process that is started now finds."""
        return {name: bytes(file.seen) for name, file in self._names.items()}

    def lose(self, kind: str, choose: random.Random) -> Files:
        """What may be found after the power went."""
        if kind == "killed":
            return self.seen()
        written = {at for file in self._names.values() for at, _ in file.pending}
        moments = sorted(written | {at for at, _ in self._renamings})
        last = {"synced only": -1, "any": moments[-1] if moments else -1}.get(kind)
        if last is None:
            last = choose.choice([-1, *moments])
        names = self._certain_names
        reached = [each for each in self._renamings if each[0] <= last]
        if reached:
            names = (choose.choice(reached) if kind == "any" else reached[-1])[1]
        return {name: _content(file, last, choose, some=kind == "any") for name, file in names.items()}


def _content(file: File, last: int, choose: random.Random, *, some: bool) -> bytes:
    content = bytearray(file.certain)
    for at, operation in file.pending:
        if at > last or (some and choose.random() < 0.5):
            continue
        torn = operation.kind == "write" and (choose.random() < TORN_SHARE if some else at == last)
        _apply(content, _torn(operation, choose) if torn else operation)
    return bytes(content)


def _torn(operation: Operation, choose: random.Random) -> Operation:
    sectors = len(operation.data) // SECTOR_BYTES
    return operation._replace(data=operation.data[: choose.randint(0, sectors) * SECTOR_BYTES])


def _apply(content: bytearray, operation: Operation) -> None:
    assert operation.offset is not None
    if operation.kind == "truncate":
        del content[operation.offset :]
    end = operation.offset + len(operation.data)
    content.extend(bytes(max(0, end - len(content))))
    content[operation.offset : end] = operation.data


def crashes(recorded: Sequence[Operation], states: int, seed: int) -> Iterator[Crash]:
    """So many states, spread over the recording, of each kind in turn."""
    choose = random.Random(seed)
    moments = sorted(choose.choices(range(len(recorded)), k=states))
    disk = Disk()
    for at, operation in enumerate(recorded):
        disk.do(at, operation)
        while moments and moments[0] == at:
            kind = KINDS[len(moments) % len(KINDS)]
            yield Crash(kind, moments.pop(0), disk.lose(kind, choose), dict(disk.acknowledged))
