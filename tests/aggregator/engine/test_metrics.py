"""What the aggregator's metrics say of unusual rounds."""

import numpy as np

from aggregator.engine.metrics import FRESHNESS_BUCKETS_S, Freshness


def test_a_clock_that_is_ahead_makes_no_freshness_negative() -> None:
    """An event from the future counts as counted at once; the sum of a histogram only grows."""
    freshness = Freshness()
    freshness.observe(np.array([-3600.0, 0.25]))
    (family,) = freshness.collect()

    assert {sample.labels.get("le", sample.name): sample.value for sample in family.samples if sample.value} == {
        **{str(edge): 1.0 if edge < 0.25 else 2.0 for edge in FRESHNESS_BUCKETS_S},
        "+Inf": 2.0,
        "meterstream_freshness_seconds_count": 2.0,
        "meterstream_freshness_seconds_sum": 0.25,
    }
