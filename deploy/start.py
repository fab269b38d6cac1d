"""How the processes that run for long begin, with as little loaded as they need.

A start is measured in hundredths of a second, since a restart is: until a gateway listens, its clients wait.
"""

import sys

from deploy.settings import Settings


def begin(process: str, settings: Settings, lifeline: int | None, listener: int | None = None) -> None:
    """Run one of the three until it is told to stop. Raises GiveUp."""
    load_structlog_alone()
    if process == "serve":
        from deploy.serve import run as serve

        serve(settings, lifeline)
        return
    from deploy.logs import crashes_logged

    with crashes_logged():
        if process == "gateway":
            from deploy.gateway import run as gateway

            gateway(settings, lifeline, listener)
        else:
            from deploy.aggregate import run as aggregate

            aggregate(settings, lifeline)


def load_structlog_alone() -> None:
    """Load structlog without rich, which it takes for a console renderer that no process of ours uses: 0.1 s.

    Tables are drawn with rich all the same, by whoever imports it afterwards.
    """
    if "structlog" in sys.modules or "rich" in sys.modules:
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # as the import system says that there is none
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]
