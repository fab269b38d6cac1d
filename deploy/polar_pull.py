"""Import the meters, customers and benefits that exist at Polar.

``pull`` reads Polar's API and writes to the running server. A meter is created, or an equal one that is not linked yet
is linked to Polar's. Customers and benefits go through ``POST /v1/webhooks/polar/objects``, which applies them as
webhooks are applied. So the order of pulling and of webhooks does not matter, and pulling again changes nothing: an
interrupted run is repeated.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from aggregator.forward.polar_client import PAGE_ROWS, Upstream, pages
from deploy.client import Api, Refused
from meters.polar_webhooks import METER_KEY

Json = dict[str, Any]
OBJECTS = "/v1/webhooks/polar/objects"
DEFINITION = ("name", "filter", "aggregation")


def pull(here: Api, there: Upstream, *, dry_run: bool, tell: Callable[[str], None]) -> Iterator[Json]:
    """Yield a row for each object: its kind, Polar's id, its name, what became of it and why.

    Args:
        here: The server that is written to.
        there: Polar's API.
        dry_run: Only say what would be done.
        tell: Hears how far the import is, after each page.

    Raises GiveUp, and Denied and NoAnswer of ``there``.
    """
    yield from _meters(here, there, dry_run)
    for kind, path in (("customer", "/v1/customers/"), ("benefit", "/v1/benefits/")):
        done = 0
        for some in _batches(pages(there.get, path)):
            objects = [{"type": kind, "data": one} for one in some]
            answer = here.post(OBJECTS, {"objects": objects, "dry_run": dry_run})
            for one, became in zip(some, answer["items"], strict=True):
                name = one.get("name") or one.get("email") or one.get("description")
                yield _row(kind, one, name, became["outcome"], became["reasons"])
            done += len(some)
            tell(f"{done} {kind}s")


def _meters(here: Api, there: Upstream, dry_run: bool) -> Iterator[Json]:
    ours = list(here.pages("/v1/meters/"))
    for theirs in pages(there.get, "/v1/meters/"):
        outcome, reasons = _meter(here, ours, theirs, dry_run)
        yield _row("meter", theirs, theirs["name"], outcome, reasons)


def _meter(here: Api, ours: list[Json], theirs: Json, dry_run: bool) -> tuple[str, list[str]]:
    """Link or create one meter. ``ours`` learns of the link, so that no meter is linked twice."""
    if any(theirs["id"] in (one["id"], one["metadata"].get(METER_KEY)) for one in ours):
        return "known", []
    if theirs.get("archived_at"):
        return "ignored", ["it is archived at Polar"]
    equal = next((one for one in ours if _is_equal(one, theirs) and METER_KEY not in one["metadata"]), None)
    if equal is not None:
        equal["metadata"] = equal["metadata"] | {METER_KEY: theirs["id"]}
        change = {"metadata": equal["metadata"]}
        return _written(dry_run, lambda: here.patch(f"/v1/meters/{equal['id']}", change), f"linked to {equal['id']}")
    body = {name: theirs[name] for name in DEFINITION}
    body["metadata"] = (theirs.get("metadata") or {}) | {METER_KEY: theirs["id"]}
    ours.append(body | {"id": theirs["id"]})
    return _written(dry_run, lambda: here.post("/v1/meters/", body), "created")


def _is_equal(one: Json, other: Json) -> bool:
    return not one.get("archived_at") and all(one[name] == other[name] for name in DEFINITION)


def _written(dry_run: bool, write: Callable[[], object], what: str) -> tuple[str, list[str]]:
    """Write unless this is a dry run. One meter that is refused does not keep the others."""
    if not dry_run:
        try:
            write()
        except Refused as error:
            return "refused", [str(error)]
    return "applied", [what]


def _row(kind: str, one: Json, name: object, outcome: str, reasons: list[str]) -> Json:
    return {"kind": kind, "polar_id": one["id"], "name": name, "outcome": outcome, "reasons": "; ".join(reasons)}


def _batches(rows: Iterator[Json]) -> Iterator[list[Json]]:
    while some := list(islice(rows, PAGE_ROWS)):
        yield some
