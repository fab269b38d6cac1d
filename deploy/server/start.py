"""Start a long-running process with as few imports as possible.

``begin`` runs one of the processes. A gateway's clients wait until it listens, so a start, like a restart, is
measured in hundredths of a second. ``without_rich`` keeps structlog and httpx from importing rich, which these
processes never use.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deploy.server.private_files import private_files
from deploy.settings import Settings


def begin(process: str, settings: Settings, lifeline: int | None, listener: int | None = None) -> None:
    """Run serve, gateway or aggregate until it is told to stop. Raises GiveUp."""
    with private_files():
        _run(process, settings, lifeline, listener)


def _run(process: str, settings: Settings, lifeline: int | None, listener: int | None) -> None:
    with without_rich():
        from deploy.server.runtime import crashes_logged
    if process == "serve":
        from deploy.server.supervisor import run as serve

        serve(settings, lifeline)
        return
    with crashes_logged():
        if process == "gateway":
            from deploy.server.gateway import run as gateway

            gateway(settings, lifeline, listener)
        else:
            with without_rich():
                from deploy.server.aggregate import run as aggregate

            aggregate(settings, lifeline)


@contextmanager
def without_rich() -> Iterator[None]:
    """Load libraries as if there were no rich, which structlog and httpx load where it is installed.

    None of these processes draws anything, and rich takes a third of a gateway's start (benchmarks/profiles/README.md).
    Code that imports rich afterwards gets it.
    """
    if "rich" in sys.modules:
        yield
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # the import system's way to say that there is none
    try:
        yield
    finally:
        del sys.modules["rich"]
