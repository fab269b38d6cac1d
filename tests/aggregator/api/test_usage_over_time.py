"""``GET /v1/usage``: half-open ranges, calendar units that are cut, totals, groups, and what is refused."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.servers.query_api import Tenant

DAY = {"start": "2026-02-01T00:00:00Z", "end": "2026-02-02T00:00:00Z"}
Event = tuple[str, int]  # when, tokens

AUTUMN: list[Event] = [
    ("2026-10-31T09:00:00Z", 1), ("2026-10-31T10:00:00Z", 2), ("2026-11-01T00:00:00Z", 4), ("2026-11-15T12:00:00Z", 8),
    ("2026-11-24T23:59:59Z", 16), ("2026-11-25T01:00:00Z", 32),
]  # fmt: skip
SPRING: list[Event] = [("2026-03-10T12:00:00Z", 10), ("2026-04-01T00:00:00Z", 100), ("2026-04-10T12:00:00Z", 1000)]
NOVEMBER: list[Event] = [("2026-11-23T08:00:00Z", 1000), ("2026-11-24T11:00:00Z", 100)]


def used(tenant: Tenant, *events: Event, **fields: Any) -> str:
    """Send events with tokens; a meter that adds them up."""
    for when, tokens in events:
        tenant.event(timestamp=when, metadata={"tokens": tokens}, **fields)
    return tenant.meter(func="sum", property="tokens")


def rows(answer: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The rows as a table."""
    return [(row["start"], row["end"], row["value"]) for row in answer["rows"]]


@pytest.mark.parametrize(
    ("events", "asked", "table", "total"),
    [
        (
            AUTUMN,
            {"start": "2026-10-31T00:00:00Z", "end": "2026-11-25T08:00:00Z", "interval": "month"},
            [
                ("2026-10-31T00:00:00Z", "2026-11-01T00:00:00Z", "3"),
                ("2026-11-01T00:00:00Z", "2026-11-25T08:00:00Z", "60"),
            ],
            "63",
        ),
        (
            SPRING,
            {"start": "2026-03-01T00:00:00Z", "end": "2026-04-01T00:00:00Z", "interval": "month"},
            [("2026-03-01T00:00:00Z", "2026-04-01T00:00:00Z", "10")],
            "10",
        ),
        (
            NOVEMBER,  # the last thirty days by the week, asked on a Tuesday at noon
            {"start": "2026-10-25T12:00:00Z", "end": "2026-11-24T12:00:00Z", "interval": "week"},
            [
                ("2026-10-25T12:00:00Z", "2026-10-26T00:00:00Z", "0"),
                ("2026-10-26T00:00:00Z", "2026-11-02T00:00:00Z", "0"),
                ("2026-11-02T00:00:00Z", "2026-11-09T00:00:00Z", "0"),
                ("2026-11-09T00:00:00Z", "2026-11-16T00:00:00Z", "0"),
                ("2026-11-16T00:00:00Z", "2026-11-23T00:00:00Z", "0"),
                ("2026-11-23T00:00:00Z", "2026-11-24T12:00:00Z", "1100"),
            ],
            "1100",
        ),
        (
            AUTUMN,  # without an interval one row, of the whole range
            {"start": "2026-10-31T09:30:00Z", "end": "2026-11-24T23:59:59Z"},
            [("2026-10-31T09:30:00Z", "2026-11-24T23:59:59Z", "14")],
            "14",
        ),
    ],
)
def test_a_range_is_half_open_and_cuts_its_units(
    tenant: Tenant, events: list[Event], asked: dict[str, str], table: list[tuple[str, str, str]], total: str
) -> None:
    """A row for every unit that the range touches, cut to the range, and a total over just the range."""
    meter = used(tenant, *events)
    answer = tenant.get("/v1/usage", meter_id=meter, **asked)
    assert rows(answer) == table
    assert answer["totals"] == [{"meter_id": meter, "value": total, "adds_up": True}]


def test_an_event_at_midnight_is_in_the_day_that_begins(tenant: Tenant) -> None:
    """Day by day nothing is missing and nothing is counted twice."""
    meter = used(tenant, ("2026-02-02T00:00:00Z", 5))
    first = datetime(2026, 2, 1, tzinfo=UTC)
    days = [first + timedelta(days=number) for number in range(3)]
    totals = [
        tenant.get("/v1/usage", meter_id=meter, start=day.isoformat(), end=(day + timedelta(days=1)).isoformat())
        for day in days
    ]
    assert [answer["totals"][0]["value"] for answer in totals] == ["0", "5", "0"]


@pytest.mark.parametrize(("day", "hours"), [("2026-03-29", 23), ("2026-10-25", 25), ("2026-03-30", 24)])
def test_a_day_has_as_many_hours_as_its_zone_gives_it(tenant: Tenant, day: str, hours: int) -> None:
    """An event in each hour of some days around a local day: the day has its own, by the day and by the hour."""
    begins = datetime.fromisoformat(f"{day}T00:00:00+00:00") - timedelta(hours=6)
    meter = used(tenant, *(((begins + timedelta(hours=hour)).isoformat(), 1) for hour in range(48)))
    within = {"start": (begins + timedelta(hours=1)).isoformat(), "end": (begins + timedelta(hours=40)).isoformat()}
    answer = tenant.get("/v1/usage", meter_id=meter, interval="day", timezone="Europe/Berlin", **within)
    assert str(hours) in [row["value"] for row in answer["rows"]]
    assert answer["totals"][0]["value"] == "39"
    (whole,) = [row for row in answer["rows"] if row["value"] == str(hours)]
    by_hour = tenant.get(
        "/v1/usage", meter_id=meter, interval="hour", timezone="Europe/Berlin", start=whole["start"], end=whole["end"]
    )
    assert [row["value"] for row in by_hour["rows"]] == ["1"] * hours


def test_values_are_text_with_all_their_digits(tenant: Tenant) -> None:
    """A sum that no double holds, and the position that it is true for."""
    tenant.event(metadata='{"tokens":99999999999999999999999999.999999999999}', timestamp=DAY["start"])
    position = tenant.send(b'{"name":"call","external_customer_id":"ann","timestamp":"2026-02-01T01:00:00Z",'
                           b'"metadata":{"tokens":0.1}}')  # fmt: skip
    meter = tenant.meter(func="sum", property="tokens")
    response = tenant.ask("GET", "/v1/usage", params=DAY | {"meter_id": meter})
    answer = response.json()
    assert answer["rows"][0]["value"] == answer["totals"][0]["value"] == "100000000000000000000000000.099999999999"
    assert answer["as_of"] == response.headers["As-Of"] == position


def test_several_meters_are_answered_in_their_order(tenant: Tenant) -> None:
    """Each has its rows and its total; one that is named twice is one."""
    tokens = used(tenant, ("2026-02-01T01:00:00Z", 3), ("2026-02-01T02:00:00Z", 4))
    least = tenant.meter(func="min", property="tokens")
    answer = tenant.get("/v1/usage", meter_id=[least, tokens, least], **DAY)
    assert [meter["id"] for meter in answer["meters"]] == [least, tokens]
    assert [row["value"] for row in answer["rows"]] == ["3", "7"]
    assert [(total["value"], total["adds_up"]) for total in answer["totals"]] == [("3", False), ("7", True)]


def test_both_names_mean_both_customers_once(tenant: Tenant) -> None:
    """Names draw each other in, and names of two customers mean both of them."""
    ann, bob = tenant.customer(external_id="ann"), tenant.customer(external_id="bob")
    meter = used(tenant, ("2026-02-01T01:00:00Z", 1), external_customer_id="ann")
    used(tenant, ("2026-02-01T01:00:00Z", 20), external_customer_id="bob")
    used(tenant, ("2026-02-01T01:00:00Z", 300), external_customer_id="eve")
    tenant.send(
        f'{{"name":"call","customer_id":"{ann}","timestamp":"2026-02-01T01:00:00Z","metadata":{{"tokens":4000}}}}'.encode()
    )

    def total(**asked: Any) -> str:
        value: str = tenant.get("/v1/usage", meter_id=meter, **DAY, **asked)["totals"][0]["value"]
        return value

    assert total() == "4321"
    assert total(customer_id=ann) == total(external_customer_id="ann") == "4001"
    assert total(customer_id=bob, external_customer_id="ann") == total(external_customer_id=["ann", "bob"]) == "4021"
    assert total(external_customer_id="eve", customer_id=bob) == "320"
    assert total(external_customer_id="nobody") == "0"


GROUPED = [
    ("ann", "a", 5), ("ann", "b", 7), ("bob", "a", 20), ("bob", None, 1), ("eve", "c", 12), ("eve", "c", 100),
]  # fmt: skip


def grouped(tenant: Tenant) -> str:
    """Usage of three customers and three models, an hour apart; a meter that adds it up."""
    for hour, (who, model, tokens) in enumerate(GROUPED):
        metadata = {"tokens": tokens} | ({"model": model} if model else {})
        tenant.event(timestamp=f"2026-02-01T0{hour}:00:00Z", metadata=metadata, external_customer_id=who)
    return tenant.meter(func="sum", property="tokens")


@pytest.mark.parametrize(
    ("asked", "table", "rest"),
    [
        ({"group_by": "metadata.model"}, [(["c"], "112"), (["a"], "25"), (["b"], "7"), ([None], "1")], []),
        ({"group_by": "metadata.model", "order": "value", "top": 2}, [([None], "1"), (["b"], "7")], ["137"]),
        ({"group_by": "external_customer_id", "top": 1}, [(["eve"], "112")], ["33"]),
        (
            {"group_by": "external_customer_id", "order": "group"},
            [(["ann"], "12"), (["bob"], "21"), (["eve"], "112")],
            [],
        ),
        ({"group_by": "metadata.model", "order": "-group", "top": 1}, [(["c"], "112")], ["33"]),
        ({"group_by": "name", "top": 5}, [(["call"], "145")], ["0"]),
        (
            {"group_by": ["external_customer_id", "metadata.model"], "top": 3},
            [(["eve", "c"], "112"), (["bob", "a"], "20"), (["ann", "b"], "7")],
            ["6"],
        ),
    ],
)  # fmt: skip
def test_groups_are_ranked_and_the_rest_is_exact(
    tenant: Tenant, asked: dict[str, Any], table: list[tuple[list[str | None], str]], rest: list[str]
) -> None:
    """Rows and remainder add up to the total; a missing key is a group of its own."""
    answer = tenant.get("/v1/usage", meter_id=grouped(tenant), **DAY, **asked)
    assert [(list(row["group"].values()), row["value"]) for row in answer["rows"]] == table
    assert [row["value"] for row in answer["remainder"]] == rest
    assert answer["totals"][0]["value"] == "145"


def test_groups_have_a_row_for_every_unit(tenant: Tenant) -> None:
    """Also where they used nothing, and so has the remainder."""
    asked = {"start": "2026-02-01T03:30:00Z", "end": "2026-02-01T05:30:00Z", "interval": "hour"}
    answer = tenant.get("/v1/usage", meter_id=grouped(tenant), group_by="external_customer_id", top=1, **asked)
    assert rows(answer) == [
        ("2026-02-01T03:30:00Z", "2026-02-01T04:00:00Z", "0"),
        ("2026-02-01T04:00:00Z", "2026-02-01T05:00:00Z", "12"),
        ("2026-02-01T05:00:00Z", "2026-02-01T05:30:00Z", "100"),
    ]
    assert [row["value"] for row in answer["remainder"]] == ["0", "0", "0"]


def test_what_cannot_be_added_is_measured_again(tenant: Tenant) -> None:
    """The remainder of distinct values and of means is counted anew, and the answer says that it adds up to nothing."""
    meter = grouped(tenant)
    mean = tenant.meter(func="avg", property="tokens")
    distinct = tenant.meter(func="unique", property="model")
    answer = tenant.get("/v1/usage", meter_id=[mean, distinct, meter], group_by="external_customer_id", top=1, **DAY)
    assert [(next(iter(row["group"].values())), row["value"]) for row in answer["rows"]] == [
        ("eve", "56"), ("ann", "2"), ("eve", "112"),
    ]  # fmt: skip
    assert [row["value"] for row in answer["remainder"]] == ["8.25", "2", "33"]
    assert [(one["value"], one["adds_up"]) for one in answer["totals"]] == [
        ("24.166666666667", False), ("3", False), ("145", True),
    ]  # fmt: skip


def test_a_customer_under_two_names_is_one_group(tenant: Tenant) -> None:
    """Grouped by either name; who was never created has no id, and who has no external id is without one."""
    ann = tenant.customer(external_id="ann")
    lone = tenant.customer()
    meter = used(tenant, ("2026-02-01T01:00:00Z", 1), external_customer_id="ann")
    used(tenant, ("2026-02-01T01:00:00Z", 5), external_customer_id="eve")
    for who, tokens in ((ann, 10), (lone, 100)):
        tenant.send(
            f'{{"name":"call","customer_id":"{who}","timestamp":"2026-02-01T01:00:00Z",'
            f'"metadata":{{"tokens":{tokens}}}}}'.encode()
        )

    def groups(key: str) -> dict[str | None, str]:
        answer = tenant.get("/v1/usage", meter_id=meter, group_by=key, **DAY)
        return {row["group"][key]: row["value"] for row in answer["rows"]}

    assert groups("external_customer_id") == {None: "100", "ann": "11", "eve": "5"}
    assert groups("customer_id") == {lone: "100", ann: "11", None: "5"}


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"start": None}, ("missing", ["query", "start"])),
        ({"end": None}, ("missing", ["query", "end"])),
        ({"meter_id": None}, ("missing", ["query", "meter_id"])),
        ({"start": "2026-02-01T00:00:00"}, ("timezone_aware", ["query", "start"])),
        ({"end": DAY["start"]}, ("value_error", ["query"])),
        ({"interval": "minute"}, ("literal_error", ["query", "interval"])),
        ({"interval": "day", "start": "2022-12-31T23:59:59Z"}, ("value_error", ["query"])),
        ({"interval": "hour", "end": "2027-03-08T00:00:01Z"}, ("value_error", ["query"])),
        ({"end": "9001-01-01T00:00:00Z"}, ("value_error", ["query"])),
        ({"timezone": "Mars/Olympus"}, ("value_error", ["query", "timezone"])),
        ({"customer_id": "x"}, ("uuid_parsing", ["query", "customer_id", 0])),
        ({"meter_id": "00000000-0000-4000-8000-00000000dead"}, ("meter_id", ["query", "meter_id"])),
        ({"group_by": "model"}, ("value_error", ["query", "group_by", 0])),
        ({"group_by": "metadata."}, ("value_error", ["query", "group_by", 0])),
        ({"group_by": ["name", "name"]}, ("value_error", ["query", "group_by", 1])),
        ({"group_by": ["name", "customer_id", "metadata.a", "metadata.b"]}, ("too_long", ["query", "group_by"])),
        ({"top": 5}, ("value_error", ["query", "top"])),
        ({"order": "value"}, ("value_error", ["query", "order"])),
        ({"group_by": "name", "top": 0}, ("greater_than_equal", ["query", "top"])),
        ({"customer": "ann"}, ("extra_forbidden", ["query", "customer"])),
        ({"start_timestamp": DAY["start"]}, ("extra_forbidden", ["query", "start_timestamp"])),
        ({"metadata[a": "x"}, ("extra_forbidden", ["query", "metadata[a"])),
    ],
)
def test_a_question_half_understood_is_refused(
    tenant: Tenant, asked: dict[str, Any], complaint: tuple[str, list[Any]]
) -> None:
    """A parameter that is missing, senseless or unknown is named."""
    params = {name: value for name, value in (DAY | {"meter_id": tenant.meter()} | asked).items() if value is not None}
    status, _, complaints = tenant.refusal("GET", "/v1/usage", params=params)
    assert (status, complaints) == (422, [complaint])


def test_an_answer_with_too_many_rows_is_refused(tenant: Tenant) -> None:
    """Counted over meters, units and groups; with fewer groups it is answered."""
    for number in range(30):
        tenant.event(timestamp="2026-02-01T01:00:00Z", metadata={"n": number})
    asked = {
        "meter_id": [tenant.meter() for _ in range(2)], "group_by": "metadata.n", "interval": "hour",
        "start": "2026-02-01T00:00:00Z", "end": "2026-02-09T00:00:00Z",
    }  # fmt: skip
    refusal = tenant.ask("GET", "/v1/usage", params=asked)
    assert refusal.status_code == 422
    assert "10000 rows" in refusal.json()["detail"][0]["msg"]
    assert len(tenant.get("/v1/usage", **asked, top=26)["rows"]) == 2 * 26 * 192
    older = {"start": "1999-01-01T00:00:00Z", "end": "2026-03-01T00:00:00Z"}  # whatever its length, where it is whole
    assert tenant.get("/v1/usage", meter_id=asked["meter_id"][0], **older)["totals"][0]["value"] == "30"
