"""What a soak stands on: a disk of its own that can become full or stand still, and a clock that can be set.

The disk is a file with ext4 on a loop device, which needs root. Elsewhere the soak stands on the ordinary disk, and
faults of the disk are left out.
"""

import contextlib
import fcntl
import os
import struct
import subprocess
from pathlib import Path

MEBIBYTE = 1 << 20
PIECES_BYTES = (256 * MEBIBYTE, 16 * MEBIBYTE, MEBIBYTE // 4)
_FREEZE, _THAW = 0xC0045877, 0xC0045878  # linux/fs.h: FIFREEZE, FITHAW; what fsfreeze(8) calls
_OUTSIDE = "METERSTREAM_"


class Ground:
    """A directory for data at ``path``, and the environment that processes on it get."""

    def __init__(self, work: Path, disk_bytes: int) -> None:
        self.path = work / "disk"
        self.path.mkdir(parents=True)
        self._image, self._ballast = work / "disk.ext4", self.path / "ballast"
        self.own_disk = os.geteuid() == 0 and self._mount(disk_bytes)
        self._clock = work / "clock"
        self.set_clock_s(0)

    def _mount(self, size: int) -> bool:
        with self._image.open("wb") as image:
            image.truncate(size)  # takes room as it is written to
        commands = (
            ["mkfs.ext4", "-q", "-F", "-m", "0", str(self._image)],
            ["mount", "-o", "loop", str(self._image), str(self.path)],
        )
        return all(_succeeds(*command) for command in commands)

    @property
    def environment(self) -> dict[str, str]:
        """Of the processes: nothing of Meterstream's from outside, and the clock."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(_OUTSIDE)}
        return clean | {"PYTHONPATH": str(Path(__file__).parent / "clock"), "METERSOAK_CLOCK": str(self._clock)}

    def set_clock_s(self, offset_s: float) -> None:
        """How far the clock is off, for every process at once."""
        with self._clock.open("r+b" if self._clock.exists() else "wb") as clock:
            clock.write(struct.pack("<q", int(offset_s * 1_000_000)))

    def fill(self) -> None:
        """Leave no room to speak of. Others write meanwhile, so it is taken piece by piece."""
        with self._ballast.open("wb") as ballast:
            taken = 0
            for piece in PIECES_BYTES:
                with contextlib.suppress(OSError):  # no such piece is left
                    while True:
                        os.posix_fallocate(ballast.fileno(), taken, piece)
                        taken += piece

    def empty(self) -> None:
        """Take the ballast away."""
        self._ballast.unlink(missing_ok=True)

    def freeze(self) -> None:
        """Every write waits until ``thaw``."""
        self._ioctl(_FREEZE)

    def thaw(self) -> None:
        """Writes go on."""
        self._ioctl(_THAW)

    def _ioctl(self, number: int) -> None:
        directory = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(directory, number, 0)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Let go of the disk. What was on it stays in its file, for ``mount -o loop``."""
        if self.own_disk:
            _succeeds("umount", "--lazy", str(self.path))


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
