"""What a meter passes over: counted and shown, with the names and keys that were probably meant."""

from datetime import timedelta
from typing import Any

import pytest

from aggregator.api import meters
from aggregator.process import UnmatchedWatch
from aggregator.service.meter_check import look
from tests.support.servers.query_api import Server, Tenant


def definition(name: str = "call", func: str = "sum", property: str = "tokens") -> dict[str, Any]:
    """A meter over events of one name."""
    clause = {"property": "name", "operator": "eq", "value": name}
    aggregation = {"func": func} | ({} if func == "count" else {"property": property})
    return {"name": "Tokens", "filter": {"conjunction": "and", "clauses": [clause]}, "aggregation": aggregation}


def preview(tenant: Tenant, **changes: Any) -> dict[str, Any]:
    """What a preview of the meter says."""
    asked = definition(**changes)
    found: dict[str, Any] = tenant.post("/v1/meters/preview", {key: asked[key] for key in ("filter", "aggregation")})
    return found


@pytest.mark.parametrize("func", ["sum", "avg", "min", "max"])
def test_numbers_that_were_sent_as_text_are_counted_and_shown(tenant: Tenant, func: str) -> None:
    """Polar's number stays 812; preview, creation and the meter say that two events add nothing."""
    for tokens in (812, "812", "812.5"):
        last = tenant.event(name="call", metadata={"tokens": tokens})
    tenant.event(name="call", metadata={"plan": "free"})
    tenant.event(name="other", metadata={"tokens": "1"})

    found = preview(tenant, func=func)
    made = tenant.post("/v1/meters/", definition(func=func))
    shown = tenant.get(f"/v1/meters/{made['id']}")

    assert (found["total"], found["events"]) == (812, 1)
    assert found["unmatched"]["example"].pop("timestamp")
    assert found["unmatched"] == {
        "no_number": 2, "absent": 1, "example": {"event_id": last, "name": "call", "value": '"812.5"'},
    }
    assert (shown, shown["unmatched"]["no_number"], made["unmatched"]["no_number"]) == (made, 2, 2)
    assert made["warnings"] == found["warnings"] == [
        "2 matching events of the last 7 days with events add nothing, because 'tokens' is not a number, such as "
        f'"812.5" in event {last}. Send the value as a number of JSON.'
    ]


@pytest.mark.parametrize(("func", "property", "value"), [
    ("unique", "plan", "free"), ("sum", "plan", 5), ("sum", "_cost.amount", None), ("count", "", "x"),
])
def test_where_every_event_adds_something_nothing_is_said(
    tenant: Tenant, func: str, property: str, value: Any
) -> None:
    """The meter has Polar's fields alone."""
    metadata = {"_cost": {"amount": "5", "currency": "usd"}} if value is None else {"plan": value}
    tenant.event(name="call", metadata=metadata)

    made = tenant.post("/v1/meters/", definition(func=func, property=property))

    assert not {"unmatched", "warnings"} & made.keys()
    assert preview(tenant, func=func, property=property)["unmatched"] == {"no_number": 0, "absent": 0, "example": None}
    assert preview(tenant, func=func, property=property)["warnings"] == []


def test_unique_passes_over_what_has_no_identity(tenant: Tenant) -> None:
    """An object is no value to tell others from; a missing key is absent."""
    tenant.event(name="call", metadata={"_llm": {"vendor": "a", "model": "b", "input_tokens": 1, "output_tokens": 1,
                                                 "total_tokens": 2}})
    tenant.event(name="call", metadata={})

    found = preview(tenant, func="unique", property="_llm")

    assert (found["unmatched"]["no_number"], found["unmatched"]["absent"]) == (1, 1)
    assert "because '_llm' is not a text, number or boolean" in found["warnings"][0]


def test_a_name_that_no_event_has_is_named_with_those_that_were_seen(tenant: Tenant) -> None:
    """With the one that was probably meant."""
    for name in ("llm.call", "llm.call", "page.view"):
        tenant.event(name=name, metadata={"tokens": 1})

    said = preview(tenant, name="llm_call")["warnings"]

    assert said == [
        "No event of the last 7 days with events is named 'llm_call'; did you mean 'llm.call'? "
        "Names seen: 'llm.call', 'page.view'."
    ]
    assert tenant.post("/v1/meters/", definition(name="llm_call"))["warnings"] == said


def test_a_key_that_no_event_has_is_named_with_those_that_were_seen(tenant: Tenant) -> None:
    """Of a filter as of an aggregation; nested keys too."""
    tenant.event(name="call", metadata={"tokens": 1, "model": "a", "_cost": {"amount": 1, "currency": "usd"}})
    tenant.event(name="other", metadata={"modle": "b"})
    asked = definition(property="tokns")
    asked["filter"]["clauses"].append({"property": "modle", "operator": "eq", "value": "a"})

    said = tenant.post("/v1/meters/", asked)["warnings"]

    keys = "Keys seen: 'tokens', 'model', '_cost.amount', '_cost.currency'."
    of = "None of the 1 newest events that may match has the metadata key"
    assert said == [f"{of} 'modle'; did you mean 'model'? {keys}", f"{of} 'tokns'; did you mean 'tokens'? {keys}"]


def test_a_dotted_key_is_found_by_its_spelling(tenant: Tenant) -> None:
    """Read as a path it is nowhere, and the warning shows how to write it."""
    key = "gen_ai.usage.input_tokens"
    tenant.event(name="call", metadata={key: 812})

    plain = preview(tenant, property=key)
    quoted = preview(tenant, property=f'"{key}"')

    assert (plain["total"], quoted["total"]) == (0, 812)
    assert f"did you mean '\"{key}\"'?" in plain["warnings"][0]
    assert quoted["warnings"] == []
    meter = tenant.meter(func="max", property=f'"{key}"')
    assert tenant.get(f"/v1/meters/{meter}")["aggregation"] == {"func": "max", "property": f'"{key}"'}
    assert tenant.get(f"/v1/meters/{meter}/usage", external_customer_id="ann")["value"] == "812"


def test_the_metric_counts_them_among_the_newest_events(server: Server, tenant: Tenant) -> None:
    """By meter; meters that pass over none, and those of nobody who sends, are absent."""
    texts, numbers = tenant.meter(func="sum", property="tokens"), tenant.meter(func="sum", property="size")
    for tokens in (1, "2", "3"):
        tenant.event(metadata={"tokens": tokens, "size": 1})
    watch = UnmatchedWatch(server.aggregator, look_s=3600)

    watch.look()
    watch.stop()

    shown = server.aggregator.telemetry.text().decode()
    assert f'meterstream_unmatched_events{{meter="{texts}"}} 2.0' in shown
    assert numbers not in shown


def test_a_meter_made_before_any_event_is_not_warned_of(tenant: Tenant) -> None:
    """Nothing was seen yet that could have been meant."""
    assert "warnings" not in tenant.post("/v1/meters/", definition())


def test_a_meter_that_is_read_again_is_looked_at_once_a_minute(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look is a store query over a week of events, and Polar's clients read meters often."""
    looked: list[object] = []

    def counting(*asked: Any) -> Any:
        looked.append(asked)
        return look(*asked)

    monkeypatch.setattr(meters, "look", counting)
    tenant.event(name="call", metadata={"tokens": "1"})
    meter = tenant.post("/v1/meters/", definition())["id"]
    looked.clear()
    first = tenant.get(f"/v1/meters/{meter}")
    assert tenant.get(f"/v1/meters/{meter}") == first
    assert len(looked) == 1
    tenant.event(name="call", metadata={"tokens": "2"})
    tenant.server.now += timedelta(minutes=1)
    assert tenant.get(f"/v1/meters/{meter}")["unmatched"]["no_number"] == 2
    tenant.patch(f"/v1/meters/{meter}", {"aggregation": {"func": "count"}})
    assert "unmatched" not in tenant.get(f"/v1/meters/{meter}")
    assert len(looked) == 3
