"""``meterstream credits``: units given to a customer by hand, and taken back."""

from typing import Annotated

import typer

from deploy.output import as_json, show, show_one
from deploy.session import EPILOG, session
from meters import exact_json

app = typer.Typer(no_args_is_help=True, help="Give customers units of a meter, and take them back.")

COLUMNS = ("at", "meter", "units", "cause", "rollover", "id", "reference")

Customer = Annotated[str, typer.Argument(help="A customer's external id, or its id.")]


@app.command(epilog=EPILOG)
def grant(
    context: typer.Context,
    customer: Customer,
    meter: Annotated[str, typer.Argument(help="A meter's id or name.")],
    units: Annotated[int, typer.Argument(min=1, help="How many.")],
    rollover: Annotated[bool, typer.Option("--rollover", help="What is left goes on after a reset.")] = False,
    key: Annotated[str | None, typer.Option(help="A name of your own for this: given once, however often run.")] = None,
) -> None:
    """Credit units. With --key a repetition of the command credits nothing more."""
    from deploy.client import blaming, header
    from deploy.commands.customers import find_customer
    from deploy.commands.meters import find_meter

    here = session(context)
    headers = {} if key is None else {"Idempotency-Key": header(key, "--key")}
    with here.api() as api, blaming({"units": "UNITS", "Idempotency-Key": "--key"}):
        path = f"/v1/customers/{find_customer(api, customer)['id']}/credits"
        body = {"meter_id": find_meter(api, meter)["id"], "units": units, "rollover": rollover}
        response = api.answer("POST", path, content=as_json(body).encode(), headers=headers)
    show_one(exact_json.decode(response.content), here.output)


@app.command(epilog=EPILOG, name="list")
def list_credits(context: typer.Context, customer: Customer) -> None:
    """Everything that was credited and taken back, newest first."""
    from deploy.commands.customers import find_customer

    here = session(context)
    with here.api() as api:
        names = {meter["id"]: meter["name"] for meter in api.pages("/v1/meters/")}
        found = list(api.pages(f"/v1/customers/{find_customer(api, customer)['id']}/credits"))
    show([{**credit, "meter": names.get(credit["meter_id"], credit["meter_id"])} for credit in found], COLUMNS,
         here.output)  # fmt: skip


@app.command(epilog=EPILOG)
def revoke(
    context: typer.Context,
    customer: Customer,
    credit: Annotated[str, typer.Argument(help="The credit's id, as `meterstream credits list` shows it.")],
) -> None:
    """Take a credit back, while the period lasts in which it was given. Repeating this takes nothing more."""
    from deploy.client import looking_for, segment
    from deploy.commands.customers import find_customer

    unknown = f"there is no credit {credit}; `meterstream credits list` shows the ids"
    here = session(context)
    with here.api() as api, looking_for(unknown):
        path = f"/v1/customers/{find_customer(api, customer)['id']}/credits/{segment(credit, 'CREDIT')}"
        response = api.answer("DELETE", path)
    show_one(exact_json.decode(response.content), here.output)
