"""How much anyone may ask: what a request quota allows, and when."""

from ingest.limits import RequestQuota


def test_a_quota_allows_a_minutes_worth_at_once_and_then_its_rate() -> None:
    """The wait that is told is the wait that is needed; each key has its own."""
    quota = RequestQuota(2)
    assert [quota.wait_s("one", 0.0) for _ in range(3)] == [0, 0, 30]
    assert quota.wait_s("other", 0.0) == 0
    assert [quota.wait_s("one", 30.0) for _ in range(2)] == [0, 30]


def test_what_was_not_asked_for_is_not_saved_up() -> None:
    """After an idle day a minute's worth is allowed, and no day's."""
    quota, later_s = RequestQuota(2), 86_400.0
    quota.wait_s("one", 0.0)
    assert [quota.wait_s("one", later_s) for _ in range(3)] == [0, 0, 30]
