"""Whether the log can be read: told once when it cannot be, and once when it can again. Alerts send people there."""

import contextlib
from collections.abc import Iterator

import structlog

from meters.log import TryAgain

logger = structlog.get_logger("aggregator")


class Readable:
    """For one thread, which asks again whatever it hears."""

    def __init__(self) -> None:
        self._waiting: set[str] = set()

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Around a question to the log. What it raises goes on."""
        try:
            yield
        except TryAgain as later:
            if what not in self._waiting:
                logger.warning("log_cannot_be_read", what=what, reason=str(later))
            self._waiting.add(what)
            raise
        if what in self._waiting:
            self._waiting.remove(what)
            logger.info("log_can_be_read_again", what=what)
