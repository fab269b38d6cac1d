"""Ordinary bodies, read by compiled loops once there are many: a third of the work of the ways without them.

A gateway starts without them, because they take a second of CPU and 110 MB; the first of some thousand events makes
them ready, in a thread, while everything is read as before. Where they cannot be had, all of it stays as before.
"""

import logging
import threading
from collections.abc import Sequence
from typing import Any

from ingest.recent import seed_of

LOAD_AFTER_BYTES = 2 * 1024 * 1024
"""Of bodies, before loops are loaded: some ten thousand events. A server with few events has no use for them."""

logger = logging.getLogger("ingest.quick")


class Quick:
    """For one event loop and its thread."""

    def __init__(self, kernels: Any = None) -> None:
        """With ``kernels`` they are used from the first body on."""
        self._kernels = kernels
        self._loading: threading.Thread | None = None
        self._bytes = 0

    @property
    def ready(self) -> bool:
        """Whether there are loops."""
        return self._kernels is not None

    def table(self, generation_max: int) -> Any:
        """``ingest.kernels.Table``, if loops are ready; None otherwise."""
        return None if self._kernels is None else self._kernels.Table(generation_max)

    def read(self, bodies: Sequence[bytes], earliest_us: int, latest_us: int, organization_id: str) -> Any:
        """The events of bodies as ``ingest.kernels.Found``, up to the first that is odd to loops.

        None if that is the first one, or loops are not ready.
        """
        if self._kernels is not None:
            return self._kernels.read(bodies, earliest_us, latest_us, seed_of(organization_id))
        self._bytes += sum(map(len, bodies))
        if self._loading is None and self._bytes > LOAD_AFTER_BYTES:
            # No daemon: a compiler that is in the way of the interpreter's end would end it with a signal.
            self._loading = threading.Thread(target=self._load, name="load-kernels")
            self._loading.start()
        return None

    def _load(self) -> None:
        try:
            import ingest.kernels as kernels

            self._kernels = kernels
            logger.info("bodies are read by compiled loops from now on")
        except Exception as error:  # slower, never wrong
            logger.warning("bodies are read without compiled loops, at half the speed: %s", error)
