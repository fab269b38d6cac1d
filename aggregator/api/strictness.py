"""What a request may say: fields of bodies and query parameters that nobody knows are refused, or counted.

What is ignored is another question than the one that was asked, and its answer is a wrong number that looks right. So
``check_parameters`` refuses query parameters that neither the route nor a client of Polar's knows, and
``takes_no_body`` names the routes that refuse a body; ``requests.known_only`` asks both of every request, once its
token is known to be good. ``unknown_fields`` does the same for the fields of a body (``bodies.py``), unless Polar would
pass over them.

A route declares its own parameters where it reads them. ``POLARS`` lists those that Polar's clients send.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from itertools import islice

from fastapi import Request
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, generate_latest

from aggregator.service.errors import Malformed
from meters.errors import COMPLAINTS_MAX, Detail, detail

NAME_COMPARED_MAX = 100
"""Characters of an unknown name that are compared with the known ones, whose longest has 29."""

PAGED = "page limit"

POLARS: dict[str, dict[str, str]] = {
    "POST /v1/events/ingest": {},
    "GET /v1/events/": {
        "0.16": "customer_id external_customer_id organization_id source start_timestamp end_timestamp metadata[key] "
        "sorting " + PAGED,
        "0.19": "filter meter_id name",
        "0.27": "query",
        "0.30": "depth parent_id",
    },
    "GET /v1/events/names": {
        "0.19": "customer_id external_customer_id organization_id source query sorting " + PAGED,
    },
    "GET /v1/events/{id}": {},
    "POST /v1/meters/": {},
    "GET /v1/meters/": {"0.16": "metadata[key] organization_id query sorting " + PAGED, "0.24": "is_archived"},
    "GET /v1/meters/{id}": {},
    "PATCH /v1/meters/{id}": {},
    "GET /v1/meters/{id}/quantities": {
        "0.16": "customer_id exernal_customer_id start_timestamp end_timestamp interval",  # misspelt in that one
        "0.19": "external_customer_id",
        "0.24": "metadata[key]",
        "0.27": "customer_aggregation_function",
        "0.30": "timezone",
    },
    "POST /v1/customers/": {},
    "GET /v1/customers/": {
        "0.10": "organization_id query sorting " + PAGED,
        "0.16": "email metadata[key]",
        "0.32": "active",
    },
    "GET /v1/customers/{id}": {},
    "PATCH /v1/customers/{id}": {},
    "DELETE /v1/customers/{id}": {"0.30": "anonymize"},
    "GET /v1/customers/{id}/state": {},
    "GET /v1/customers/external/{external_id}": {},
    "PATCH /v1/customers/external/{external_id}": {},
    "DELETE /v1/customers/external/{external_id}": {"0.30": "anonymize"},
    "GET /v1/customers/external/{external_id}/state": {},
    "POST /v1/customer-sessions/": {},
    "GET /v1/customer-meters/": {
        "0.19": "customer_id external_customer_id meter_id organization_id sorting " + PAGED,
    },
    "GET /v1/customer-meters/{id}": {},
    "POST /v1/benefits/": {},
    "GET /v1/benefits/": {
        "0.5": "organization_id type " + PAGED,
        "0.19": "query sorting",
        "0.24": "metadata[key]",
        "0.30": "id exclude_id",
    },
    "GET /v1/benefits/{id}": {},
    "PATCH /v1/benefits/{id}": {},
    "DELETE /v1/benefits/{id}": {},
    "GET /v1/benefits/{id}/grants": {
        "0.5": "is_granted user_id github_user_id " + PAGED,
        "0.10": "customer_id",
        "0.30": "member_id",
    },
    "GET /v1/customer-portal/meters/": {"0.19": "meter_id query sorting " + PAGED},
    "GET /v1/customer-portal/meters/{id}": {},
    "GET /v1/customer-portal/customer-session/introspect": {},
    "GET /v1/customer-portal/customers/me": {},
    "POST /v1/webhooks/endpoints": {},
    "GET /v1/webhooks/endpoints": {"0.24": "organization_id " + PAGED},
    "GET /v1/webhooks/endpoints/{id}": {},
    "PATCH /v1/webhooks/endpoints/{id}": {},
    "PATCH /v1/webhooks/endpoints/{id}/secret": {},
    "DELETE /v1/webhooks/endpoints/{id}": {},
    "GET /v1/webhooks/deliveries": {
        "0.24": "endpoint_id start_timestamp end_timestamp " + PAGED,
        "0.30": "event_type http_code_class query succeeded",
    },
    "POST /v1/webhooks/events/{id}/redeliver": {},
    "GET /v1/metrics/": {
        "0.5": "start_date end_date interval organization_id product_id product_price_type",
        "0.16": "billing_type customer_id",
        "0.24": "timezone",
        "0.30": "metrics",
    },
    "GET /v1/metrics/limits": {},
    "POST /webhooks/polar": {},
}
"""Polar's operations, and the query parameters of each by the version of its Python client that sends them first.

Versions 0.5, 0.10, 0.16, 0.19, 0.24, 0.27, 0.30, 0.32 and 1.0 were read, 1.0 with its three versions of the API. Later
ones send what earlier ones did, but for ``user_id``, ``github_user_id``, ``product_price_type`` and
``exernal_customer_id``. The last operation is ours: Polar sends the webhooks that it takes.
"""

_REGISTRY = CollectorRegistry()
_PASSED_OVER = Counter(
    "meterstream_passed_over",
    "Fields of bodies, by definition, and query parameters, by operation, that Polar's clients may send and nothing "
    "here reads",
    ["where"],
    registry=_REGISTRY,
)


def passed_over_text() -> bytes:
    """What was passed over, in Prometheus' text format."""
    return generate_latest(_REGISTRY)


def check_parameters(request: Request) -> None:
    """Refuse query parameters that nobody knows, and count those that only Polar does. Raises Malformed."""
    if not request.query_params:
        return
    operation, own = _operation(request), _own_parameters(request.scope["route"])
    polars = _polars_parameters(operation)
    others = {name: given for name, given in request.query_params.items() if not _is_own(own, name)}
    unknown = {name: given for name, given in others.items() if name not in polars}
    if unknown:
        raise Malformed(_complaints(("query",), unknown, {*own, *polars}))
    if others:
        _PASSED_OVER.labels(operation).inc(len(others))


def takes_no_body(request: Request) -> bool:
    """Whether the route is one of our own that is described, and without a body."""
    route: APIRoute = request.scope["route"]
    is_described = route.include_in_schema and "requestBody" not in (route.openapi_extra or {})
    return is_described and request.method != "GET" and _operation(request) not in POLARS


def unknown_fields(
    where: str, body: Mapping[str, object], known: Iterable[str], *, is_refused: bool, loc: tuple[str | int, ...]
) -> list[Detail]:
    """Return a complaint for each field at ``loc`` of a body that the definition ``where`` does not have.

    Where they are not refused they are counted instead.
    """
    unknown = {name: value for name, value in body.items() if name not in known}
    if unknown and not is_refused:
        _PASSED_OVER.labels(where).inc(len(unknown))
    return _complaints(loc, unknown, known) if is_refused else []


def _complaints(loc: tuple[str | int, ...], unknown: Mapping[str, object], known: Iterable[str]) -> list[Detail]:
    """Complain about the first unknown names. A body has room for 200,000, and each is compared with all known ones."""
    first = islice(unknown.items(), COMPLAINTS_MAX)
    return [detail("extra_forbidden", (*loc, name), _message(name, known), given) for name, given in first]


def _message(name: str, known: Iterable[str]) -> str:
    similar = get_close_matches(name[:NAME_COMPARED_MAX], sorted(known), n=1)
    return "Extra inputs are not permitted" + (f": did you mean '{similar[0]}'?" if similar else "")


def _is_own(own: Mapping[str, bool], name: str) -> bool:
    """Whether a parameter is the route's: ``limit``, or ``metadata[key]`` as an entry of one that is an object."""
    object_name, bracket, _ = name.partition("[")
    return own.get(object_name) is (bool(bracket) and name.endswith("]"))


def _own_parameters(route: APIRoute) -> dict[str, bool]:
    """The names of the parameters that a route reads, and whether they are objects, given entry by entry."""
    key = route.unique_id
    if key not in _OWN:
        declared = [field for field in get_flat_params(route.dependant) if isinstance(field.field_info, Query)]
        described = [one for one in (route.openapi_extra or {}).get("parameters", ()) if one["in"] == "query"]
        objects = {one["name"]: one.get("style") == "deepObject" for one in described}
        _OWN[key] = dict.fromkeys([field.alias for field in declared], False) | objects
    return _OWN[key]


_OWN: dict[str, dict[str, bool]] = {}  # what the routes' declarations come to, by route


@cache
def _polars_parameters(operation: str) -> frozenset[str]:
    return frozenset(name for names in POLARS.get(operation, {}).values() for name in names.split())


def _operation(request: Request) -> str:
    """The operation as the document and ``POLARS`` name it."""
    return f"{request.method} {request.scope['route'].path_format}"
