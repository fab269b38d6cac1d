"""``meterstream polar pull``: what exists at Polar comes over, once, however often it is asked for.

A second server plays Polar.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.client import Api
from tests.support.servers.installation import Installation, started

Json = dict[str, Any]
SUM = {"func": "sum", "property": "tokens"}
FILTER = {"conjunction": "and", "clauses": [{"property": "name", "operator": "eq", "value": "call"}]}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """A server with two meters, a few customers and a benefit."""
    with started(tmp_path_factory.mktemp("theirs")) as there:
        with Api(there.url, there.token) as api:
            meters = [api.post("/v1/meters/", definition(name)) for name in ("Tokens", "Calls")]
            for who in ("ann", "bob", None):
                body = {"email": f"{who}@example.com", "name": who, "metadata": {"plan": "pro"}}
                api.post("/v1/customers/", body | ({"external_id": who} if who else {}))
            properties = {"meter_id": meters[0]["id"], "units": 100, "rollover": True}
            api.post("/v1/benefits/", {"type": "meter_credit", "description": "A plan", "properties": properties})
        yield there


def definition(name: str) -> Json:
    """A meter of tokens."""
    return {"name": name, "filter": FILTER, "aggregation": SUM}


def pull(here: Installation, there: Installation, *options: str) -> dict[str, list[str]]:
    """Run the command; what became of the objects, by kind."""
    done = here.run(
        "polar", "pull", *options, "--output", "json", METERSTREAM_POLAR_TOKEN=there.token,
        METERSTREAM_POLAR_SERVER=there.url,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = {}
    for row in json.loads(done.stdout):
        found.setdefault(row["kind"], []).append(row["outcome"])
    return found


def listed(server: Installation, path: str) -> list[Json]:
    """A list of the API."""
    items: list[Json] = server.get(path).json()["items"]
    return items


def test_what_exists_at_polar_is_imported_once(installation: Installation, theirs: Installation) -> None:
    """A dry run changes nothing; an equal meter is linked and not made twice; a second run finds all of it known."""
    installation.start()
    with Api(installation.url, installation.token) as api:
        equal = api.post("/v1/meters/", definition("Tokens"))["id"]
        known = api.post("/v1/customers/", {"email": "b@example.com", "external_id": "bob"})["id"]
    everything = {"meter": ["applied"] * 2, "customer": ["applied"] * 3, "benefit": ["applied"]}
    assert pull(installation, theirs, "--dry-run") == everything
    assert [len(listed(installation, path)) for path in ("/v1/meters/", "/v1/customers/", "/v1/benefits/")] == [1, 1, 0]
    assert pull(installation, theirs) == everything

    polars = {one["name"]: one["id"] for one in listed(theirs, "/v1/meters/")}
    linked = {one["name"]: one["metadata"]["polar_meter_id"] for one in listed(installation, "/v1/meters/")}
    assert linked == polars
    (benefit,) = listed(installation, "/v1/benefits/")
    assert benefit["properties"] == {"meter_id": equal, "units": 100, "rollover": True}
    ids = {one["name"]: one["id"] for one in listed(theirs, "/v1/customers/")}
    found = {one["name"]: (one["id"], one["metadata"]) for one in listed(installation, "/v1/customers/")}
    plan = {"plan": "pro"}
    assert found == {"ann": (ids["ann"], plan), "bob": (known, plan), None: (ids[None], plan)}

    again = pull(installation, theirs)
    assert again == {"meter": ["known"] * 2, "customer": ["known"] * 3, "benefit": ["known"]}


def test_pulling_needs_a_token_of_polars(installation: Installation) -> None:
    """The command says which variable to set."""
    installation.start()
    done = installation.run("polar", "pull")
    assert (done.returncode, "METERSTREAM_POLAR_TOKEN" in done.stderr) == (2, True)
