"""The reads that the query API answers from memory, listed once for the gateway and the query API.

The gateway relays these reads without ASGI, and the query API answers them before its framework. Both do so only for
a path in exactly this form (``FastRead``, ``path_pattern``). Any other form of the path gets the same answer through
the framework.
"""

import re
from enum import Enum

ID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
"""Pattern of a UUID in the form in which answers show it."""

_SEGMENT = "[-A-Za-z0-9._~!$&'()*+,;=:@%]+"
"""Pattern of a percent-encoded path segment (RFC 3986)."""


class FastRead(Enum):
    """A read that memory answers. The value is the route of its endpoint in the query API."""

    CUSTOMER_METER = "/v1/customer-meters/{id}"
    CUSTOMER_METERS = "/v1/customer-meters/"
    USAGE = "/v1/meters/{id}/usage"
    STATE = "/v1/customers/{id}/state"
    STATE_BY_EXTERNAL_ID = "/v1/customers/external/{external_id}/state"


def path_pattern(read: FastRead) -> re.Pattern[str]:
    """Return the pattern of the read's path as requests spell it. A group matches the id, if the path has one."""
    return re.compile(read.value.replace("{id}", f"({ID})").replace("{external_id}", f"({_SEGMENT})"))


FAST_PATHS = re.compile("|".join(path_pattern(read).pattern for read in FastRead).encode())
"""Pattern of every fast read's path."""
