"""What a grant takes back when it ends."""

from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from meters.benefits import Benefit, Grant, GrantSet
from meters.catalogue import decode_change, encode_change
from meters.credit import CreditGranted
from meters.granting import granted, revoked

T0 = datetime(2026, 1, 1, tzinfo=UTC)
BENEFIT = Benefit(
    id="b", organization_id="org", description="Tokens", meter_id="m", units=100, rollover=True, created_at=T0
)
GRANT = Grant(id="g", organization_id="org", benefit_id="b", customer_id="c", created_at=T0, granted_at=T0)


@pytest.mark.parametrize("rolls_over", [False, True])
def test_a_grant_knows_what_kind_of_units_it_gave(rolls_over: bool) -> None:
    """It keeps it in the log, because the benefit may be edited before it ends."""
    told = decode_change(encode_change(GrantSet(granted(GRANT, replace(BENEFIT, rollover=rolls_over), T0).grant)))
    assert isinstance(told, GrantSet)
    (back,) = revoked(told.grant, T0 + timedelta(days=1)).movements
    assert isinstance(back, CreditGranted)
    assert back.rollover is rolls_over
