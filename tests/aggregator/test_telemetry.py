"""What the aggregator's metrics say of unusual rounds."""

import numpy as np

from aggregator.telemetry import Freshness


def test_a_clock_that_is_ahead_makes_no_freshness_negative() -> None:
    """An event from the future counts as counted at once; the sum of a histogram only grows."""
    freshness = Freshness()
    freshness.observe(np.array([-3600.0, 0.25]))
    (family,) = freshness.collect()

    assert {sample.labels.get("le", sample.name): sample.value for sample in family.samples if sample.value} == {
        **dict.fromkeys(("0.01", "0.025", "0.05", "0.1", "0.15", "0.2"), 1.0),
        **dict.fromkeys(("0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "60.0", "600.0"), 2.0),
        "+Inf": 2.0,
        "meterstream_freshness_seconds_count": 2.0,
        "meterstream_freshness_seconds_sum": 0.25,
    }
