"""Signatures of webhooks, as Standard Webhooks writes them, with both readings of a secret.

The signed text is ``id.timestamp.body``. The standard's key is the secret without ``whsec_``, decoded from base64;
Polar's is the UTF-8 of the whole secret as its dashboard shows it. Both are in use, so what comes in may be signed
with either. The body is the bytes as they arrived: a body that was parsed and written again has another signature.
"""

import contextlib
import hmac
from base64 import b64decode, b64encode
from collections.abc import Mapping
from enum import StrEnum
from hashlib import sha256

PREFIX = "whsec_"
TOLERANCE_S = 300
"""Seconds that a sender's clock may be off; who records a delivery has no longer than this to repeat it."""

ID_LENGTH_MAX = 256
"""Characters of a delivery's id: a UUID has 36; it is kept for as long as the log."""

SIGNATURES_MAX = 10
"""Signatures in one header: one per valid secret. More would be work for whoever has none."""

_SECONDS_DIGITS_MAX = 12  # of a timestamp: until the year 33658


class Rejection(StrEnum):
    """Why a delivery is not believed."""

    HEADERS = "webhook-id, webhook-timestamp or webhook-signature is missing or malformed"
    TOO_OLD = "webhook-timestamp is too old"
    TOO_NEW = "webhook-timestamp is in the future"
    SIGNATURE = "no signature matches"


def keys(secret: str) -> list[bytes]:
    """Every key that a secret may stand for: Polar's reading first, the standard's where it is one."""
    found = [secret.encode()]
    with contextlib.suppress(ValueError):  # not base64: nobody can have meant it that way
        found.append(b64decode(secret.removeprefix(PREFIX), validate=True))
    return [key for key in found if key]


def signature(key: bytes, id: str, timestamp: str, body: bytes) -> str:
    """One signature, with its version in front."""
    signed = hmac.new(key, f"{id}.{timestamp}.".encode(), sha256)
    signed.update(body)  # not copied, and other threads run meanwhile
    return "v1," + b64encode(signed.digest()).decode()


def rejection(headers: Mapping[str, str], now_s: int) -> Rejection | None:
    """Why a delivery should not be believed whoever signed it; None where its signature is worth looking at.

    ``headers`` has lower-case names; ``now_s`` are seconds since 1970. It costs next to nothing, so it is asked first.
    """
    id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    given = headers.get("webhook-signature", "").split()
    if not (0 < len(id) <= ID_LENGTH_MAX and id.isprintable() and 0 < len(given) <= SIGNATURES_MAX):
        return Rejection.HEADERS
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= _SECONDS_DIGITS_MAX):
        return Rejection.HEADERS
    if int(timestamp) < now_s - TOLERANCE_S:
        return Rejection.TOO_OLD
    if int(timestamp) > now_s + TOLERANCE_S:
        return Rejection.TOO_NEW
    return None


def is_signed(secret: str, headers: Mapping[str, str], body: bytes) -> bool:
    """Whether a holder of the secret signed a delivery that there is no ``rejection`` of. Reads all of the body."""
    id, timestamp = headers["webhook-id"], headers["webhook-timestamp"]
    presented = [text.encode() for text in headers["webhook-signature"].split()]
    wanted = [signature(key, id, timestamp, body).encode() for key in keys(secret)]
    matches = [hmac.compare_digest(one, other) for one in wanted for other in presented]
    return any(matches)
