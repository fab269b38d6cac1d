"""A disk that is small, can be nearly filled, and emptied again while it is in use: a tmpfs with a ballast."""

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SIZE_KIB = 64 << 10


class SmallDisk:
    """Mounted at ``path``. Without root the test skips; a root that may not mount skips it, too, but fails in CI."""

    def __init__(self, path: Path) -> None:
        self.path, self._ballast = path, path / "ballast"
        path.mkdir()
        reason = None if os.geteuid() == 0 else "mounting a small disk needs root"
        if reason is None:
            mounted = _run("mount", "-t", "tmpfs", "-o", f"size={SIZE_KIB}k", "tmpfs", str(path))
            reason = None if mounted.returncode == 0 else f"cannot mount a tmpfs: {mounted.stderr.strip()}"
            if reason and os.environ.get("CI") == "true":
                pytest.fail(reason)
        if reason:
            pytest.skip(reason)

    def fill(self, leave_kib: int) -> None:
        """Leave only so much room."""
        status = os.statvfs(self.path)
        with self._ballast.open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, status.f_bavail * status.f_frsize - (leave_kib << 10))

    def empty(self) -> None:
        """Take the ballast away."""
        self._ballast.unlink()

    def close(self) -> None:
        """Unmount; files that are still open keep it alive for their users alone."""
        _run("umount", "--lazy", str(self.path))


@contextlib.contextmanager
def nothing_written() -> Iterator[None]:
    """The operating system refuses every write of this process to a file, as a full quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
