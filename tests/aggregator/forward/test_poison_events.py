"""When an event that fails alone is at fault, and when Polar is."""

import random

from aggregator.forward.forwarder import STRIKES_MAX, Suspects

SEED = 20261121


def test_an_event_that_fails_while_others_pass_is_condemned() -> None:
    """After so many strikes; it is sent alone from the first one on."""
    suspects = Suspects()
    for _ in range(STRIKES_MAX):
        assert not suspects.failed("bad")
        suspects.accepted(["good"])
        assert suspects.struck == {"bad"}
    assert suspects.failed("bad")
    assert suspects.struck == set()


def test_an_outage_is_held_against_nobody() -> None:
    """Whatever fails alone meanwhile, as the next request fails, too; the end of it costs one event a strike."""
    suspects, drawn = Suspects(), random.Random(SEED)
    for _ in range(1_000):
        suspects.others_failed()
        assert not suspects.failed(drawn.choice("abc"))
    suspects.accepted(["d"])
    assert len(suspects.struck) == 1
    assert not suspects.is_open


def test_what_is_taken_at_last_is_forgiven() -> None:
    """Its strikes are gone, and its own acceptance is none against it."""
    suspects = Suspects()
    suspects.failed("slow")
    suspects.accepted(["good"])
    suspects.failed("slow")
    suspects.accepted(["slow", "good"])
    assert suspects.struck == set()
