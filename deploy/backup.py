"""Back up and restore an installation: copies that belong together, readable by their owner only.

``back_up`` works while the server runs. It copies the forwarder's file, then the store, then the log, so no copy knows
a record that the log's copy lacks. A running server's store cannot be copied; it is rebuilt from the log. ``restore``
checks every copy before it touches anything, and moves the files that it replaces aside.
"""

import contextlib
import hashlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from aggregator.forward.sqlite_errors import Unusable
from aggregator.forward.state import State
from deploy.errors import USAGE, GiveUp
from deploy.forwarding import alone
from deploy.server.data import DataDirectory
from deploy.server.private_files import private_files
from ingest.log.sqlite_file import copy_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS, format_position

MANIFEST = "backup.json"  # written last: a directory without it is no whole backup
FORMAT = 1
READ_BYTES = 1 << 20
STREAMS = (USAGE_EVENTS, USAGE_CONTROL)
REPAIRS = "reconcile/repairs.jsonl"


class Copied(msgspec.Struct, frozen=True):
    """A file of a backup."""

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """What a backup has: its files, and where the log ended in it, by stream."""

    format: int
    made_at: datetime
    log: str  # the file's name, or the URL of the brokers that have it
    ends: dict[str, str]
    files: list[Copied]


def back_up(data: DataDirectory, target: Path) -> Manifest:
    """Copy the installation into a directory that is empty or not there. Raises GiveUp, and leaves no half backup.

    The store is copied where no server holds it, and has to be where retention removed what it counted.
    """
    data.require()
    data.require_directory()
    _make_empty(target)
    with private_files(), _whole_or_nothing(target):
        if data.forwarding.exists():
            _copy_forwarding(data, target)
        has_store = _copy_store(data, target)
        ends = _copy_log(data, target, has_store=has_store)
        repairs = data.path / REPAIRS
        if repairs.exists():
            (target / REPAIRS).parent.mkdir(mode=0o700)
            _copy_file(repairs, target / REPAIRS)
        files = [_described(target, path) for path in sorted(target.rglob("*")) if path.is_file()]
        manifest = Manifest(FORMAT, datetime.now(UTC), data.log_url or data.log.name, ends, files)
        _write(target / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    return manifest


def _make_empty(target: Path) -> None:
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise GiveUp(f"{target} is not empty; give a directory that is, or a new one", USAGE)
        target.chmod(0o700)
    except OSError as error:
        raise GiveUp(f"cannot make the backup in {target}: {error.strerror}") from None


@contextlib.contextmanager
def _whole_or_nothing(target: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        for path in target.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if isinstance(error, OSError | sqlite3.Error):
            raise GiveUp(f"the backup in {target} cannot be made: {error}; nothing is left of it") from error
        raise


def _copy_forwarding(data: DataDirectory, target: Path) -> None:
    try:
        with contextlib.closing(State(data.forwarding)) as state:
            state.copy(target / data.forwarding.name)
    except Unusable as reason:
        raise GiveUp(str(reason)) from reason


def _copy_store(data: DataDirectory, target: Path) -> bool:
    """Whether there is a copy: none of a store that is not there, or that a running server holds."""
    if not data.store.exists():
        return False
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(data.hold("copy the store"))
        except GiveUp:
            return False
        for path in (data.store, data.store.with_name(f"{data.store.name}.wal")):
            if path.exists():
                _copy_file(path, target / path.name)
    return True


def _copy_log(data: DataDirectory, target: Path, *, has_store: bool) -> dict[str, str]:
    """Copy the log, if it is a file, and say where it ends; the copy is opened for that."""
    if data.has_log:
        copy_log(data.log, target / data.log.name)
    copied = DataDirectory(target) if data.has_log else data
    with contextlib.closing(copied.open_log()) as log:
        if any(log.starts(USAGE_EVENTS).values()) and not has_store:
            raise GiveUp(
                "retention removed the log's first records, and only the store has what they counted, which cannot be "
                "copied while a server holds it: stop the server and back up then"
            )
        return {stream: format_position(log.ends(stream)) for stream in STREAMS}


def _copy_file(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("xb") as write:
        shutil.copyfileobj(read, write, READ_BYTES)
        write.flush()
        os.fsync(write.fileno())


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _described(target: Path, path: Path) -> Copied:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Copied(str(path.relative_to(target)), path.stat().st_size, digest)


def restore(data: DataDirectory, source: Path) -> tuple[Manifest, Path | None]:
    """Put a backup in place of what is here; the manifest, and where the replaced files are now.

    Raises GiveUp while a server runs, and for a backup that is not whole: then nothing is changed.
    """
    manifest = _checked(source)
    if data.has_log != (manifest.log == data.log.name):
        raise GiveUp(f"the log of this backup is {manifest.log}; give --log as that installation has it", USAGE)
    with data.hold("restore"), alone(data, patient=False), private_files():
        try:
            aside = _move_aside(data)
            # The log comes last: a start refuses a store without its log, so it never begins with half a restore.
            for copied in sorted(manifest.files, key=lambda copied: copied.name == data.log.name):
                place = data.path / copied.name
                if not place.parent.exists():
                    place.parent.mkdir(mode=0o700)
                    data.give_to_owner(place.parent)
                unfinished = place.with_name(f"{place.name}.restoring")
                unfinished.unlink(missing_ok=True)
                _copy_file(source / copied.name, unfinished)
                data.give_to_owner(unfinished)
                unfinished.rename(place)
            _sync(data.path)
        except OSError as error:
            raise GiveUp(
                f"cannot restore into {data.path}: {error}; mend that and restore again, before anything is started"
            ) from error
    return manifest, aside


def _checked(source: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode((source / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise GiveUp(f"there is no whole backup in {source} ({MANIFEST}: {error})") from None
    if manifest.format != FORMAT:
        raise GiveUp(f"the backup in {source} has format {manifest.format}, and this program reads {FORMAT}")
    for copied in manifest.files:
        path = source / copied.name
        is_inside = not Path(copied.name).is_absolute() and ".." not in path.parts
        if not is_inside or not path.is_file() or _described(source, path) != copied:
            raise GiveUp(f"{path} is not the file that was backed up; nothing is changed. Take another backup")
    return manifest


def _move_aside(data: DataDirectory) -> Path | None:
    """Keep what a restore replaces; None where there is nothing."""
    databases = (data.log, data.store, data.forwarding)
    endings = ("", "-wal", "-shm", ".wal")
    found = [path for base in databases for ending in endings if (path := Path(f"{base}{ending}")).exists()]
    found += [path for path in [data.path / REPAIRS] if path.exists()]
    if not found:
        return None
    aside = data.path / f"before-restore-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    aside.mkdir(mode=0o700)
    data.give_to_owner(aside)
    for path in found:
        path.rename(aside / path.name)
    return aside


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
