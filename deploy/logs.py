"""Logs: one JSON object a line on stderr, from our own code and from the libraries alike.

A secret that slips into an event is taken out by its name. What a person should read on a terminal is printed by the
commands; logs are for machines.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from structlog.typing import EventDict, Processor

from deploy.giving_up import BUG, GiveUp

ROOMS = ("aggregator", "deploy", "ingest")
SECRET_KEYS = frozenset({"token", "secret", "authorization", "password"})


def configure_logs(process: str, level: str) -> None:
    """Set up logging for this process; ``process`` is added to every line."""

    def name_process(_: object, __: str, event: EventDict) -> EventDict:
        return {**event, "process": process}

    chain: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        name_process,
        hide_secrets,
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=chain,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    # Libraries are heard when something is wrong; our own rooms as the setting says.
    logging.basicConfig(level=max(logging.WARNING, logging.getLevelName(level.upper())), handlers=[handler], force=True)
    for room in ROOMS:
        logging.getLogger(room).setLevel(level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *chain,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


@contextmanager
def crashes_logged() -> Iterator[None]:
    """Log what should not happen with its traceback, and leave; the supervisor starts the process again."""
    try:
        yield
    except GiveUp:
        raise  # explains itself in one line
    except Exception:
        structlog.get_logger().exception("crashed")
        raise SystemExit(BUG) from None


def hide_secrets(_: object, __: str, event: EventDict) -> EventDict:
    """Take out what is secret by its name."""
    return {name: "***" if name.lower() in SECRET_KEYS else value for name, value in event.items()}
