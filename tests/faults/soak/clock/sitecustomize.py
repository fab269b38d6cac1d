"""A clock that can be set while a process runs, without being root: Python loads this file at the start of a process.

With this folder on PYTHONPATH, ``time.time`` and ``time.time_ns`` are off by as many microseconds as the file that
METERSOAK_CLOCK names holds in its first eight bytes. The file is mapped, so a step reaches every process at once.
"""

import mmap
import os
import struct
import time

_file = os.environ.get("METERSOAK_CLOCK")
if _file:
    with open(_file, "rb") as _opened:
        _offset = mmap.mmap(_opened.fileno(), 8, access=mmap.ACCESS_READ)
    _time, _time_ns = time.time, time.time_ns

    def _offset_us() -> int:
        offset: int = struct.unpack("<q", _offset[:8])[0]
        return offset

    time.time = lambda: _time() + _offset_us() / 1e6
    time.time_ns = lambda: _time_ns() + _offset_us() * 1000
