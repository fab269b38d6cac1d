"""A meter's running totals against a recount of its stored events.

Running totals live in the aggregator's memory; a preview of the same definition counts the stored events again. Both
answers name the position they are true for, and only answers for the same position are compared.
"""

from decimal import Decimal
from typing import Any

from deploy.client import Api
from deploy.giving_up import GiveUp
from deploy.output import as_json
from meters import exact_json

ATTEMPTS_MAX = 20  # while events flow, two answers for one position need some luck


def compare_totals(api: Api, meter: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """A row for each of the meter's largest customers, and how many customers it has.

    Raises GiveUp when events arrive faster than one can compare.
    """
    for _ in range(ATTEMPTS_MAX):
        recounted, as_of = _recount(api, meter)
        rows, positions = [], {as_of}
        for customer in recounted["top_customers"]:
            running, position = _running(api, meter, customer)
            positions.add(position)
            recount = Decimal(customer["quantity"])
            name = customer["external_customer_id"] or customer["customer_id"]
            rows.append({"customer": name, "running": running, "recounted": recount, "equal": running == recount})
        if len(positions) == 1:
            return rows, recounted["customers"]
    raise GiveUp("events arrive too quickly to compare two answers; try again when it is quieter")


def _recount(api: Api, meter: dict[str, Any]) -> tuple[dict[str, Any], str]:
    definition = as_json({"filter": meter["filter"], "aggregation": meter["aggregation"]}).encode()
    response = api.answer("POST", "/v1/meters/preview", content=definition)
    return exact_json.decode(response.content), response.headers["As-Of"]


def _running(api: Api, meter: dict[str, Any], customer: dict[str, Any]) -> tuple[Decimal, str]:
    who = {name: customer[name] for name in ("customer_id", "external_customer_id") if customer[name] is not None}
    response = api.answer("GET", f"/v1/meters/{meter['id']}/usage", params=who)
    return Decimal(response.json()["value"]), response.headers["As-Of"]
