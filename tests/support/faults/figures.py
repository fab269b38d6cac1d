"""What every fault over Kafka tells, in one order: a figure that has no meaning says so, and none is left out."""

from tests.support.faults.sender import Outcome
from tests.support.faults.store_checks import SEED


def told(fault: str, outcome: Outcome, recovery: float | str, more: str = "", *, seed: int | str = SEED) -> str:
    """Sent, acked, stored, dead, lost, doubled, recovery, seed.

    ``recovery`` is in seconds, or says of whom, or why there is none; so does ``seed`` where nothing is drawn.
    """
    away = f"{recovery:.2f} s" if isinstance(recovery, float) else recovery
    return f"kafka, {fault}: {outcome}, recovery {away}, seed {seed}{more and '; '}{more}"
