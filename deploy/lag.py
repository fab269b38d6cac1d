"""The lag of a running installation, from the metrics that its aggregator publishes."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from deploy.client import http_client, stranger
from deploy.giving_up import GiveUp

PATIENCE_S = 10.0
POSITION, END = "meterstream_position", "meterstream_log_end"


def measured(url: str) -> list[dict[str, int]]:
    """A row for each partition of usage.events. Raises GiveUp when nothing answers, or the aggregator is away."""
    try:
        with http_client(url, timeout=PATIENCE_S) as http:
            answer = http.get("/metrics").raise_for_status()
    except httpx.HTTPError as error:
        raise GiveUp(f"no metrics at {url}: {error}; name a gateway or an aggregator with --url") from None
    try:
        found = _parsed(answer.text)
    except ValueError:
        raise stranger(url) from None
    if not found[END]:
        raise GiveUp(f"the aggregator behind {url} does not say how far it is: it starts, or is away; try again")
    return [
        {"partition": partition, "position": position, "end": end, "lag": max(0, end - position)}
        for partition, end in sorted(found[END].items())
        for position in (found[POSITION].get(partition, 0),)
    ]


def _parsed(metrics: str) -> dict[str, dict[int, int]]:
    """Position and end by partition. Raises ValueError for what are no metrics."""
    found: dict[str, dict[int, int]] = {POSITION: {}, END: {}}
    for family in text_string_to_metric_families(metrics):
        if family.name in found:
            found[family.name] = {int(sample.labels["partition"]): int(sample.value) for sample in family.samples}
    return found
