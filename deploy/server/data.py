"""The data directory: which files it has, and which process may hold it.

    log.sqlite      the log, the only truth          any process may append, one aggregator reads; none with Kafka
    store.duckdb    the view of it                   the aggregator alone
    api.sock        the aggregator's query API       the gateway passes reads on to it
    forward.sqlite  the state of forwarding          the forwarder writes, the aggregator shows it in /metrics
    reconcile/      tokens, an interrupted run,      ``meterstream reconcile`` alone
                    and the record of repairs
    serve.lock      who serves from here             held by ``serve`` and its children as long as one of them lives
    forward.lock    who forwards from here           held by the forwarder

``DataDirectory`` has the paths, opens the log and checks that files that belong together are there; ``hold`` takes
the lock. Locks are the operating system's, on open files: a lock ends with the last process that holds it, so there
is never a stale lock to remove by hand.
"""

import contextlib
import fcntl
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from deploy.errors import USAGE, GiveUp
from deploy.settings import Settings, read_environment
from ingest.log import open_log
from meters.log import Log, PositionLost, Refused, TryAgain

# A unix socket's path has at most 108 bytes with a final zero (Linux unix(7); macOS has 104).
SOCKET_PATH_BYTES_MAX = 103
# A killed server's lock is released when the kernel has ended its children: within milliseconds, unless it is busy.
LOCK_PATIENCE_S = 3.0
REBUILD = "meterstream rebuild"
AS_OWNER = "run this as the user that the server runs as"
# After a crash, SQLite would copy the write-ahead log into a log file put beside it, and ruin that file.
PUT_BACK = "stop everything, move log.sqlite* away (mv log.sqlite* elsewhere/), then put the copy in place"


class LostLog(msgspec.Struct, frozen=True):
    """A directory without its log's file, and the names of the files that are there because it was."""

    path: Path
    left: list[str]

    @property
    def found(self) -> str:
        """What is wrong."""
        return f"there is no log.sqlite in {self.path}, but {' and '.join(self.left)} of one that was"

    @property
    def heal(self) -> str:
        """The way on, and the one that gives up what was counted."""
        return (
            f"restore log.sqlite from a backup ({PUT_BACK}), or name the right place with --data or --log; only if "
            f"nobody has that log any more, move {' and '.join(self.left)} away, and the next start begins anew"
        )


class DataDirectory(msgspec.Struct, frozen=True):
    """The files of one installation, and where its log is if that is none of them."""

    path: Path
    log_url: str = ""  # kafka://...; empty: the file here
    secrets: dict[str, str] = {}  # what the URL needs and does not hold

    @property
    def has_log(self) -> bool:
        """Whether the log is a file here, and not the affair of brokers."""
        return not self.log_url

    @property
    def log(self) -> Path:
        """The log's file."""
        return self.path / "log.sqlite"

    @property
    def store(self) -> Path:
        """The store's file."""
        return self.path / "store.duckdb"

    @property
    def forwarding(self) -> Path:
        """The file of the forwarder's state; there is one once something was forwarded."""
        return self.path / "forward.sqlite"

    @property
    def socket(self) -> Path:
        """Where the aggregator answers. Raises GiveUp when the operating system has no room for so long a path."""
        path = self.path / "api.sock"
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise GiveUp(f"{path} is too long for a socket ({SOCKET_PATH_BYTES_MAX} bytes); give a shorter --data")
        return path

    def lost_log(self) -> "LostLog | None":
        """What is left of an installation whose log's file is gone; a new log would take events that nobody counts."""
        made_after_log = (self.store, self.forwarding, self.path / "log.sqlite-wal")
        # In this order, so that a process that makes both meanwhile is not taken for a loss.
        left = [path.name for path in made_after_log if self.has_log and os.path.exists(path)]
        return LostLog(self.path, left) if left and not os.path.exists(self.log) else None

    def _refuse_lost_log(self) -> None:
        if lost := self.lost_log():
            raise GiveUp(f"{lost.found}: {lost.heal}")

    def open_log(self) -> Log:
        """The log, made if there never was one. Raises GiveUp when it cannot be opened."""
        self._refuse_lost_log()
        try:
            return open_log(self.log_url or f"embedded:{self.path}", secrets=self.secrets)
        except ValueError as error:
            raise GiveUp(f"--log: {error}", USAGE) from None
        except (TryAgain, Refused, PositionLost) as error:
            raise GiveUp(f"{error}; `meterstream doctor --data {self.path}` looks closer") from error

    def check_url(self) -> None:
        """Raises GiveUp where no Kafka client can be made of the log's URL, whether brokers answer or not."""
        if self.has_log:
            return
        from ingest.log.kafka_admin import Complaint, make_admin, parse_address

        try:
            make_admin(parse_address(self.log_url, self.secrets), Complaint())
        except ValueError as error:
            raise GiveUp(f"--log: {error}", USAGE) from None

    def healing(self, remedy: str) -> str:
        """The remedy with the --data that its command needs here, which is none for the usual place."""
        if self.path == read_environment().data:
            return remedy
        return remedy.replace(REBUILD, f"{REBUILD} --data {shlex.quote(str(self.path))}")

    def make(self) -> None:
        """Make the directory if there is none; only its owner may look inside. Raises GiveUp."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise GiveUp(f"cannot make the data directory {self.path}: {error.strerror}; give another --data") from None

    def require(self) -> None:
        """Raises GiveUp when there should be a log here and is none."""
        try:
            is_there = not self.has_log or self.log.exists()
        except OSError as error:
            raise GiveUp(f"cannot look into {self.path}: {error.strerror}; {AS_OWNER}") from None
        if not is_there:
            self._refuse_lost_log()
            raise GiveUp(
                f"there is no Meterstream data in {self.path}; start one with `meterstream serve --data {self.path}`, "
                "or name the right place with --data"
            )

    def require_directory(self) -> None:
        """Raises GiveUp when there is no directory: with the log on Kafka nothing else tells that it was mistyped."""
        if not self.path.is_dir():
            raise GiveUp(f"there is no directory {self.path}; name the right place with --data, or make it first")

    def require_store(self) -> None:
        """Raises GiveUp when there is no store here."""
        try:
            is_there = bool(self.store.stat())
        except (FileNotFoundError, NotADirectoryError):
            is_there = False
        except OSError as error:
            raise GiveUp(f"cannot look into {self.path}: {error.strerror}; {AS_OWNER}") from None
        if not is_there:
            raise GiveUp(f"there is no store in {self.path}; name the right place with --data")

    def give_to_owner(self, made: Path | int) -> None:
        """What root makes in the directory is its owner's, or the server that runs as that user could not open it."""
        if os.geteuid() == 0:
            owner = self.path.stat()
            os.chown(made, owner.st_uid, owner.st_gid)

    @contextlib.contextmanager
    def hold(self, purpose: str) -> Iterator[int]:
        """Hold the directory alone; gives the file descriptor of the lock, for children to inherit.

        Raises GiveUp when somebody else holds it: ``purpose`` says what cannot be done meanwhile.
        """
        self.make()
        try:
            lock = os.open(self.path / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise GiveUp(f"cannot {purpose}: {self.path} cannot be written: {error.strerror}") from None
        try:
            if not _locked(lock):
                raise GiveUp(
                    f"cannot {purpose}: another server (process {_owner(lock)}) uses {self.path}; "
                    "stop it first, or give another --data"
                )
            self.give_to_owner(lock)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            yield lock
        finally:
            os.close(lock)


def data_directory(settings: Settings) -> DataDirectory:
    """The installation that the settings name."""
    secrets = {"password": settings.kafka_password, "key_password": settings.kafka_key_password}
    return DataDirectory(settings.data, settings.log, {name: secret for name, secret in secrets.items() if secret})


def _owner(lock: int) -> int:
    """The process that took the lock; its children may hold it after it. 0 when that is not written."""
    text = os.pread(lock, 20, 0).strip()
    return int(text) if text.isdigit() else 0


def _locked(lock: int) -> bool:
    """Whether the lock could be had: at once, or soon after the death of whoever took it."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if _runs(_owner(lock)) or time.monotonic() > deadline:
                return False
            time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks only
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process is one, too
    return process != 0 and not _is_zombie(process)


def _is_zombie(process: int) -> bool:
    """Whether it is dead and nobody has asked what of; told on Linux alone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
