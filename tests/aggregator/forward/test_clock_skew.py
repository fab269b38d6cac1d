"""How far behind Polar's clock is taken to be."""

from aggregator.forward.forwarder import EASE_US, SKEW_FIRST_US, SKEW_MAX_US, Skew

NOW_US = 1_772_000_000_000_000


def test_it_doubles_while_polar_calls_times_the_future() -> None:
    """From a first step on, up to what no honest clock reaches."""
    skew = Skew()
    assumed = [skew.grow(NOW_US) for _ in range(12)]
    assert skew.at(NOW_US) == SKEW_MAX_US
    assert assumed[:3] == [SKEW_FIRST_US, 2 * SKEW_FIRST_US, 4 * SKEW_FIRST_US]
    assert assumed[-1] == SKEW_MAX_US


def test_it_is_halved_while_nothing_is_refused() -> None:
    """Every few minutes, down to nothing; a refusal in between makes it twice what it is by then."""
    skew = Skew()
    for _ in range(3):
        skew.grow(NOW_US)
    assert skew.at(NOW_US + EASE_US - 1) == 4 * SKEW_FIRST_US
    assert skew.at(NOW_US + 2 * EASE_US) == SKEW_FIRST_US
    assert skew.grow(NOW_US + 2 * EASE_US) == 2 * SKEW_FIRST_US
    assert skew.at(NOW_US + 100 * EASE_US) == 0


def test_a_clock_that_was_set_back_delays_it_by_no_more_than_usual() -> None:
    """Otherwise it would be kept until the old time comes again."""
    skew = Skew()
    skew.grow(NOW_US)
    assert skew.at(NOW_US - 100 * EASE_US) == SKEW_FIRST_US
    assert skew.at(NOW_US - 99 * EASE_US) == 0
