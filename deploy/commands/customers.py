"""``meterstream customers`` and ``meterstream credits``: customers, their balances and their credits.

``customers`` lists and creates customers, and shows the balance, the ledger and the state of one. ``credits`` grants
units of a meter by hand, and revokes them. ``find_customer`` accepts an external id or an id.
"""

from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from deploy.client import EPILOG, session
from deploy.console import Output, as_json, show, show_one, show_table, text
from deploy.errors import USAGE, GiveUp
from meters import exact
from meters.exact import EXACT

# Customers.

if TYPE_CHECKING:
    from deploy.client import Api

app = typer.Typer(no_args_is_help=True, help="Customers, their balances, and every movement that led to them.")

COLUMNS = ("external_id", "id", "email", "name", "created_at")
BALANCE_COLUMNS = ("meter", "credited_units", "consumed_units", "balance", "modified_at", "id")
LEDGER_COLUMNS = ("at", "cause", "units", "balance", "events", "id")
PATH = "/v1/customers/"

Customer = Annotated[str, typer.Argument(help="A customer's external id, or its id.")]


@app.command(epilog=EPILOG, name="list")
def list_customers(
    context: typer.Context,
    query: Annotated[str | None, typer.Option(help="Only those whose name, email or external id has this.")] = None,
) -> None:
    """The organization's customers, newest first."""
    here = session(context)
    with here.api() as api:
        show(list(api.pages(PATH, query=query)), COLUMNS, here.output)


@app.command(epilog=EPILOG)
def create(
    context: typer.Context,
    email: Annotated[str, typer.Option(help="An address; no two customers share one.")],
    external_id: Annotated[str | None, typer.Option(help="What you call the customer yourself.")] = None,
    name: Annotated[str | None, typer.Option(help="For display.")] = None,
) -> None:
    """Make a customer. Usage that named the external id before belongs to it from now on."""
    from deploy.client import blaming

    here = session(context)
    body = {"email": email, "external_id": external_id, "name": name}
    with here.api() as api, blaming({"email": "--email", "external_id": "--external-id", "name": "--name"}):
        show_one(api.post(PATH, {key: value for key, value in body.items() if value is not None}), here.output)


@app.command(epilog=EPILOG)
def balance(context: typer.Context, customer: Customer) -> None:
    """What the customer was credited, used and has left, meter by meter."""
    here = session(context)
    with here.api() as api:
        found = find_customer(api, customer)
        meters = list(api.pages("/v1/customer-meters/", customer_id=found["id"], sorting="meter_name"))
    show([{**one, "meter": one["meter"]["name"]} for one in meters], BALANCE_COLUMNS, here.output)


@app.command(epilog=EPILOG)
def ledger(
    context: typer.Context,
    customer: Customer,
    meter: Annotated[str, typer.Argument(help="A meter's id or name.")],
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many movements, the newest ones.")] = 50,
    entry: Annotated[str | None, typer.Option(help="The id of usage: show the events behind it instead.")] = None,
) -> None:
    """The account as a statement, oldest movement first: what came, what went, and what was left each time."""
    from deploy.client import looking_for, segment
    from deploy.commands.events import EVENT_COLUMNS
    from deploy.commands.meters import find_meter

    here = session(context)
    with here.api() as api:
        one = _customer_meter(api, find_customer(api, customer), find_meter(api, meter))
        if entry is not None:
            with looking_for(f"{entry} is no usage, and only usage has events; without --entry this shows the ids"):
                path = f"/v1/customer-meters/{one['id']}/ledger/{segment(entry, '--entry')}/events"
                behind = list(api.pages(path))
            show(behind, EVENT_COLUMNS, here.output)
            return
        page = api.get(f"/v1/customer-meters/{one['id']}/ledger", limit=limit)
    entries = page["items"][::-1]
    if here.output is not Output.table:
        show(entries, LEDGER_COLUMNS, here.output)
        return
    earlier = page["pagination"]["total_count"] - len(entries)
    who = one["customer"]["external_id"] or one["customer"]["id"]
    rows = [{**entry, "units": _signed(entry["units"])} for entry in entries]
    if earlier:
        brought = EXACT.subtract(entries[0]["balance"], entries[0]["units"])
        rows.insert(0, {"at": "", "cause": f"{earlier} earlier", "balance": brought})
    show_table(rows, LEDGER_COLUMNS, title=f"{one['meter']['name']} of {who}")
    credited, consumed = text(one["credited_units"]), text(one["consumed_units"])
    print(f"Balance {text(one['balance'])}: credited {credited}, consumed {consumed} since the last reset.")


@app.command(epilog=EPILOG)
def state(context: typer.Context, customer: Customer) -> None:
    """The customer with subscriptions, benefits and balances, as Polar's API tells it."""
    here = session(context)
    with here.api() as api:
        show_one(api.get(f"{PATH}{find_customer(api, customer)['id']}/state"), here.output)


def find_customer(api: "Api", wanted: str) -> dict[str, Any]:
    """The customer of this external id, or of this id. Raises GiveUp."""
    from deploy.client import Missing, Refused, segment

    id = segment(wanted, "CUSTOMER")
    for path in (f"{PATH}external/{id}", f"{PATH}{id}"):
        try:
            found: dict[str, Any] = api.get(path)
        except (Missing, Refused):  # an external id is no UUID
            continue
        if _is_called(found, wanted):
            return found
    raise GiveUp(
        f"there is no customer {wanted!r}; `meterstream customers list` shows the customers; if only events name this "
        "one, create it with `meterstream customers create`", USAGE,
    )


def _is_called(found: dict[str, Any], wanted: str) -> bool:
    """Whether it is who was asked for: a proxy that decodes paths asks for somebody else where a name has a slash."""
    try:
        return wanted == found["external_id"] or UUID(wanted) == UUID(found["id"])
    except ValueError:
        return False


def _customer_meter(api: "Api", customer: dict[str, Any], meter: dict[str, Any]) -> dict[str, Any]:
    found = api.get("/v1/customer-meters/", customer_id=customer["id"], meter_id=meter["id"])["items"]
    if not found:
        who = customer["external_id"] or customer["id"]
        raise GiveUp(f"{who} has used nothing of {meter['name']}, and was credited nothing")
    one: dict[str, Any] = found[0]
    return one


def _signed(units: Any) -> str:
    return f"+{text(units)}" if units > 0 else text(units)


# Credits.

credit_app = typer.Typer(no_args_is_help=True, help="Give customers units of a meter, and take them back.")

CREDIT_COLUMNS = ("at", "meter", "units", "cause", "rollover", "id", "reference")


@credit_app.command(epilog=EPILOG)
def grant(
    context: typer.Context,
    customer: Customer,
    meter: Annotated[str, typer.Argument(help="A meter's id or name.")],
    units: Annotated[int, typer.Argument(min=1, help="How many.")],
    rollover: Annotated[bool, typer.Option("--rollover", help="Keep unused units after a reset.")] = False,
    key: Annotated[
        str | None, typer.Option(help="A name of your own: a command with the same key credits once.")
    ] = None,
) -> None:
    """Credit units of a meter to a customer. With --key, running the command again credits nothing more.

    Example: meterstream credits grant ada tokens 100000 --key ada-2026-03
    """
    from deploy.client import blaming, header
    from deploy.commands.meters import find_meter

    here = session(context)
    headers = {} if key is None else {"Idempotency-Key": header(key, "--key")}
    with here.api() as api, blaming({"units": "UNITS", "Idempotency-Key": "--key"}):
        path = f"/v1/customers/{find_customer(api, customer)['id']}/credits"
        body = {"meter_id": find_meter(api, meter)["id"], "units": units, "rollover": rollover}
        response = api.answer("POST", path, content=as_json(body).encode(), headers=headers)
    show_one(exact.decode(response.content), here.output)


@credit_app.command(epilog=EPILOG, name="list")
def list_credits(context: typer.Context, customer: Customer) -> None:
    """Everything that was credited and taken back, newest first."""

    here = session(context)
    with here.api() as api:
        names = {meter["id"]: meter["name"] for meter in api.pages("/v1/meters/")}
        found = list(api.pages(f"/v1/customers/{find_customer(api, customer)['id']}/credits"))
    show([{**credit, "meter": names.get(credit["meter_id"], credit["meter_id"])} for credit in found], CREDIT_COLUMNS,
         here.output)  # fmt: skip


@credit_app.command(epilog=EPILOG)
def revoke(
    context: typer.Context,
    customer: Customer,
    credit: Annotated[str, typer.Argument(help="The credit's id, as `meterstream credits list` shows it.")],
) -> None:
    """Take a credit back, while the period lasts in which it was given. Repeating this takes nothing more."""
    from deploy.client import looking_for, segment

    unknown = f"there is no credit {credit}; `meterstream credits list` shows the ids"
    here = session(context)
    with here.api() as api, looking_for(unknown):
        path = f"/v1/customers/{find_customer(api, customer)['id']}/credits/{segment(credit, 'CREDIT')}"
        response = api.answer("DELETE", path)
    show_one(exact.decode(response.content), here.output)
