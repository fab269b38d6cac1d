"""Which events of a delivery have an external_id that was taken with other content.

A gateway remembers only the newest events, and calls such a one a duplicate, or takes it for new. What became of it is
known when it is counted: it is a dead letter then, of a record that this delivery wrote.
"""

from typing import Any, NamedTuple

import httpx

from deploy.client import Api, refused
from deploy.giving_up import GiveUp
from deploy.sending import Delivery
from meters import exact_json
from meters.log import format_position, parse_position

PATH = "/v1/dead-letters/"
REASON = "conflict"
WAIT_S = 20  # that the answer may be kept back until all is counted; the server's own limit is 30
PAGE_LETTERS = 100
PAGES_MAX = 100  # whoever has more conflicts has one cause


class Conflicts(NamedTuple):
    """How many events are; ``is_all`` where nobody stopped counting them."""

    events: int
    is_all: bool = True


def find_conflicts(api: Api, delivery: Delivery) -> Conflicts | None:
    """Count them; None for a server that names no place in a log. Raises GiveUp where it cannot be known."""
    records = {partition: set(offsets) for partition, offsets in delivery.records.items()}
    if not records:
        return None
    found: set[str] = set()  # letters that come meanwhile move others to the next page
    for page in range(1, PAGES_MAX + 1):
        try:
            answer = exact_json.decode(_page(api, page, records).content)
            letters: list[dict[str, Any]] = answer["items"]
            places = [(records.get(one["log_partition"], set()), one["log_offset"]) for one in letters]
            ours = zip(letters, places, strict=True)
            found |= {one["id"] for one, (own, offset) in ours if offset in own and one["reason"] == REASON}
            is_past = bool(letters) and not any(own and offset >= min(own) for own, offset in places)
            if is_past or page >= answer["pagination"]["max_page"]:
                return Conflicts(len(found))
        except (KeyError, TypeError, ValueError):
            raise GiveUp("what the server answers is no list of dead letters") from None
    return Conflicts(len(found), is_all=False)


def _page(api: Api, page: int, records: dict[int, set[int]]) -> httpx.Response:
    """A page of letters, the newest first, once every record is counted. Raises GiveUp."""
    wanted = {partition: max(offsets) + 1 for partition, offsets in records.items()}
    headers = {"Prefer": f"wait={WAIT_S}", "Log-Position": format_position(wanted)}
    try:
        response = api.send("GET", PATH, params={"page": page, "limit": PAGE_LETTERS}, headers=headers)
    except httpx.TransportError as error:
        raise api.unreachable(error) from None
    if not response.is_success:
        raise refused(response)
    as_of = parse_position(response.headers.get("As-Of", "")) or {}
    if any(as_of.get(partition, 0) < offset for partition, offset in wanted.items()):
        raise GiveUp(f"the server has not counted them after {WAIT_S} s")
    return response
