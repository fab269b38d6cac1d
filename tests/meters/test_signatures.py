"""Signatures of webhooks, held against the library of Standard Webhooks."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from meters.webhooks import SIGNATURES_MAX, TOLERANCE_S, Rejection, is_signed, keys, rejection, signature

NOW_S = 1_767_225_600
BODY = b'{"type":"customer.created"}'


def headers(secret: str, **changed: str) -> dict[str, str]:
    """What the holder of a secret sends now."""
    stamp = changed.get("timestamp", str(NOW_S))
    signed = [signature(key, "id-1", stamp, BODY) for key in keys(secret)]
    sent = {"webhook-id": "id-1", "webhook-timestamp": stamp, "webhook-signature": signed[0]}
    return sent | {f"webhook-{name}": value for name, value in changed.items()}


@given(key=st.binary(min_size=24, max_size=64), body=st.text(), id=st.text("abc-123", min_size=1))
def test_a_signature_is_the_standards(key: bytes, body: str, id: str) -> None:
    """The library makes the same one."""
    at = datetime.fromtimestamp(NOW_S, UTC)
    assert signature(key, id, str(NOW_S), body.encode()) == Webhook(key).sign(id, at, body)


def test_a_secret_is_read_in_both_ways() -> None:
    """Polar takes the whole text, the standard what follows the prefix, decoded; no base64 leaves one reading."""
    assert keys("whsec_c2VjcmV0") == [b"whsec_c2VjcmV0", b"secret"]
    assert keys("whsec_not base64!") == [b"whsec_not base64!"]
    assert keys("") == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"signature": f"v1,bm90aGluZw== {signature(b'other', 'id-1', str(NOW_S), BODY)}"}, Rejection.SIGNATURE),
        ({"signature": f"v2,x v1a,y {signature(keys('s' * 20)[0], 'id-1', str(NOW_S), BODY)}"}, None),
        ({"signature": " ".join(["v1,x"] * (SIGNATURES_MAX + 1))}, Rejection.HEADERS),
        ({"signature": ""}, Rejection.HEADERS),
        ({"id": ""}, Rejection.HEADERS),
        ({"id": "x" * 300}, Rejection.HEADERS),
        ({"id": "id-2"}, Rejection.SIGNATURE),
        ({"timestamp": "soon"}, Rejection.HEADERS),
        ({"timestamp": "-1"}, Rejection.HEADERS),
        ({"timestamp": "9" * 40}, Rejection.HEADERS),
        ({"timestamp": str(NOW_S - TOLERANCE_S)}, None),
        ({"timestamp": str(NOW_S - TOLERANCE_S - 1)}, Rejection.TOO_OLD),
        ({"timestamp": str(NOW_S + TOLERANCE_S + 1)}, Rejection.TOO_NEW),
    ],
)
def test_what_is_not_believed_is_named(changed: dict[str, str], expected: Rejection | None) -> None:
    """Each defect has its name, and one good signature among several is enough. All but that need no body."""
    sent = headers("s" * 20, **changed)
    found = rejection(sent, NOW_S)
    if found is None and not is_signed("s" * 20, sent, BODY):
        found = Rejection.SIGNATURE
    assert found == expected


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_header_that_is_missing_is_named(name: str) -> None:
    """Each of the three is needed."""
    sent = headers("s" * 20)
    del sent[name]
    assert rejection(sent, NOW_S) == Rejection.HEADERS


def test_nothing_is_believed_without_a_secret() -> None:
    """An empty secret signs nothing."""
    sent = headers("s" * 20) | {"webhook-signature": signature(b"", "id-1", str(NOW_S), BODY)}
    assert not is_signed("", sent, BODY)
