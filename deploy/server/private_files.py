"""New files readable by their owner only: ``private_files`` sets the umask of a block.

The log contains the secrets of webhooks, and the store everyone's usage. The data directory is often created by others,
such as a volume open to all, so each file is created private. Existing files keep their mode. A module of its own,
because a start needs it before anything that takes time to import.
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
