"""What an installation writes is for its owner alone.

The log holds the secrets of webhooks, and the store what everybody used. The data directory is often made by others, a
volume say, and open to all; so each file is made closed by itself. One that is there keeps its mode.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

UMASK = 0o077


@contextmanager
def private_files() -> Iterator[None]:
    """Whatever file is made meanwhile, by this process or its children, nobody else may read."""
    before = os.umask(UMASK)
    try:
        yield
    finally:
        os.umask(before)
