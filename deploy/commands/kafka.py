"""``meterstream kafka`` and ``meterstream lag``: create the log's topics, and show how far the store is behind.

``kafka init`` creates or compares the two topics (``ingest.log.kafka_admin``). ``lag`` reads the metrics of the
aggregator.
"""

import time
from typing import Annotated

import typer

from deploy.client import EPILOG, session
from deploy.console import note, show
from deploy.errors import FAILED, USAGE, GiveUp

app = typer.Typer(no_args_is_help=True, help="The log on Kafka: make its topics, and look at their settings.")

LAG_COLUMNS = ("partition", "position", "end", "lag")
POSITION, END = "meterstream_position", "meterstream_log_end"  # metrics of the aggregator
LOOKED = "meterstream_lag_looked_seconds"
LOOK_AGE_MAX_S = 10.0  # it looks every two seconds, and waits three for an answer
LAG_PATIENCE_S = 10.0


@app.command(epilog=EPILOG)
def init(
    context: typer.Context,
    partitions: Annotated[int | None, typer.Option(min=1, help="Of usage.events; 12 by default.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Of both topics; 3 where there are 3 brokers.")] = None,
    retention_days: Annotated[int, typer.Option(min=0, help="How long events are kept; 0 keeps all.")] = 0,
    flush: Annotated[bool, typer.Option("--flush", help="Each record on the disk before it is confirmed.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Change settings that differ.")] = False,
) -> None:
    """Make the two topics, or compare those that are there with what they should be; exit code 1 if they differ."""
    from ingest.log.kafka_admin import Unreachable, Wanted, make_topics, parse_address

    here = session(context)
    data = here.data
    if data.has_log:
        raise GiveUp("say which brokers with --log kafka://HOST:PORT, or METERSTREAM_LOG", USAGE)
    try:
        address = parse_address(data.log_url, data.secrets)
        found = make_topics(address, Wanted(partitions, replicas, retention_days, flush, repair))
    except ValueError as error:
        raise GiveUp(f"--log: {error}", USAGE) from None
    except Unreachable as error:
        raise GiveUp(f"{error}") from None
    rows = [
        {"topic": each.topic, "subject": each.subject, "done": each.done, "wrong": each.wrong} for each in found
    ]
    show(rows, ("topic", "subject", "done", "wrong"), here.output)
    wrong = [each for each in found if each.wrong]
    if wrong:
        helps = any(each.is_repairable for each in wrong)
        way = "--repair changes what can be changed" if helps else "no --repair helps"
        raise GiveUp(f"not as it should be in {len(wrong)} places, which the last column names; {way}", FAILED)
    note("The topics are as they should be.")


def lag(context: typer.Context) -> None:
    """How many records of each partition the store has not counted yet, as the aggregator at --url measured it.

    Exit code 1 where it could not look for a while, since the brokers do not answer it.
    """
    here = session(context)
    rows, looked_s = measured(_metrics(here.settings.url), here.settings.url)
    show(rows, LAG_COLUMNS, here.output)
    age_s = time.time() - looked_s
    if age_s > LOOK_AGE_MAX_S:
        raise GiveUp(
            f"this is as of {age_s:.0f} s ago; the brokers do not answer the aggregator, whose log lines say more"
        )
    note(f"{sum(row['lag'] for row in rows)} records behind.")


def _metrics(url: str) -> str:
    """What a gateway or an aggregator says of itself. Raises GiveUp when nothing answers."""
    import httpx

    from deploy.client import http_client

    try:
        with http_client(url, timeout=LAG_PATIENCE_S) as http:
            return http.get("/metrics").raise_for_status().text
    except httpx.HTTPError as error:
        raise GiveUp(f"no metrics at {url}: {error}; name a gateway or an aggregator with --url") from None


def measured(metrics: str, url: str) -> tuple[list[dict[str, int]], float]:
    """A row for each partition of usage.events, and when the end was looked at, in seconds since 1970.

    Raises GiveUp for what are no metrics, and when the aggregator is away.
    """
    from deploy.client import stranger

    try:
        found, looked_s = _parsed(metrics)
    except ValueError:
        raise stranger(url) from None
    if not found[END]:
        raise GiveUp(f"the aggregator behind {url} does not say how far it is: it starts, or is away; try again")
    rows = []
    for partition, looked_at in sorted(found[END].items()):
        position = found[POSITION].get(partition, 0)
        end = max(looked_at, position)  # what is counted is there, though the end was looked at before
        rows.append({"partition": partition, "position": position, "end": end, "lag": end - position})
    return rows, looked_s


def _parsed(metrics: str) -> tuple[dict[str, dict[int, int]], float]:
    """Position and end by partition, and when they were known. Raises ValueError for what are no metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[int, int]] = {POSITION: {}, END: {}}
    looked_s = 0.0
    for family in text_string_to_metric_families(metrics):
        if family.name in found:
            found[family.name] = {int(sample.labels["partition"]): int(sample.value) for sample in family.samples}
        elif family.name == LOOKED:
            looked_s = max(sample.value for sample in family.samples)
    return found, looked_s
