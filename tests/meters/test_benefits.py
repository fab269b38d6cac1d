"""What a grant takes back when it ends."""

from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from meters.catalogue.catalogue import decode_change, encode_change
from meters.ledger.benefits import Benefit, Grant, GrantSet, granted, revoked
from meters.ledger.ledger import CreditGranted

T0 = datetime(2026, 1, 1, tzinfo=UTC)
BENEFIT = Benefit(
    id="b", organization_id="org", description="Tokens", meter_id="m", units=100, rollover=True, created_at=T0
)
GRANT = Grant(id="g", organization_id="org", benefit_id="b", customer_id="c", created_at=T0, granted_at=T0)


@pytest.mark.parametrize("is_polars", [False, True])
def test_a_grant_knows_what_kind_of_units_it_gave(is_polars: bool) -> None:
    """An edited benefit changes nothing of it; a grant of Polar's, which does not say, goes by the benefit."""
    line = encode_change(GrantSet(granted(GRANT, BENEFIT, T0, None).grant))
    if is_polars:
        line = line.replace(b',"last_credited_rollover":true', b"")
    told = decode_change(line)
    assert isinstance(told, GrantSet)
    (back,) = revoked(told.grant, replace(BENEFIT, rollover=False), T0 + timedelta(days=1), None).movements
    assert isinstance(back, CreditGranted)
    assert back.rollover is not is_polars
