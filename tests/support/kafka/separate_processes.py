"""Gateways and an aggregator as processes of their own, over their own topics, with a token from the command line."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import httpx

from meters.log import partition_key, partition_of
from tests.support.kafka.installation import Process
from tests.support.ports import take_port
from tests.support.servers.installation import PATIENCE_S, meterstream
from tests.support.waiting import eventually

PARTITIONS = 4


def answer(*arguments: str, code: int = 0, **environment: str) -> Any:
    """What a command prints as JSON."""
    done = meterstream(*arguments, "--output", "json", **environment)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


class Apart:
    """An aggregator and gateways that share brokers and nothing else, and a token."""

    def __init__(self, log_url: str, folder: Path) -> None:
        """Nothing is asked of the brokers yet, which may come later; ``prepare`` before ``start``."""
        self.log_url, self.folder = log_url, folder
        self.organization_id, self.token = "", "polar_oat_of_nobody_yet"
        where = ["--log", log_url, "--port"]
        api_port, ports = take_port(), (take_port(), take_port())
        self.aggregator = Process("aggregator", ["aggregate", *where, str(api_port), "--data", str(folder)], folder)
        upstream = ["--upstream", f"http://127.0.0.1:{api_port}"]
        self.gateways = [
            Process(f"gateway-{port}", ["gateway", *where, str(port), *upstream, "--data", "/nowhere"], folder)
            for port in ports
        ]
        self.api_url = f"http://127.0.0.1:{api_port}"
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self.http = httpx.Client(timeout=PATIENCE_S)
        self.started: set[str] = set()

    def prepare(self) -> None:
        """Make the topics, an organization and a token."""
        answer("kafka", "init", "--log", self.log_url, "--partitions", str(PARTITIONS))
        self.organization_id = answer("orgs", "create", "acme", "--log", self.log_url)["id"]
        self.token = self.new_token()

    def new_token(self) -> str:
        """A token made on the command line, without any server."""
        done = meterstream("tokens", "create", "--name", "test", "--log", self.log_url)
        assert done.returncode == 0, done.stderr
        [found] = {match.group() for match in re.finditer(r"polar_oat_[\w-]+", done.stdout + done.stderr)}
        return found

    def start(self) -> None:
        """Start all, and wait until each serves."""
        self.launch()
        self.await_service()

    def launch(self) -> None:
        """Start all."""
        for process in (self.aggregator, *self.gateways):
            process.start()
            self.started.add(process.name)

    def await_service(self) -> None:
        """Wait until each serves."""
        eventually(lambda: all(self.status(f"{url}/readyz") == 200 for url in self.urls))
        eventually(lambda: self.status(f"{self.api_url}/v1/meters/") == 200)

    def status(self, url: str, token: str | None = None) -> int:
        """The status of a read; 0 while nothing listens."""
        assert self.aggregator.running or "aggregator" not in self.started, self.aggregator.output
        with contextlib.suppress(httpx.TransportError):
            return self.http.get(url, headers={"Authorization": f"Bearer {token or self.token}"}).status_code
        return 0

    def ingest(self, url: str, *events: dict[str, Any], token: str | None = None) -> httpx.Response:
        """Send the events to one gateway."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        return self.http.post(f"{url}/v1/events/ingest", json={"events": events}, headers=headers)

    def partition(self, customer: str) -> int:
        """Where a customer's events go."""
        return partition_of(partition_key(self.organization_id, customer), PARTITIONS)

    def names(self, position: str) -> set[str]:
        """The names of all events, as a gateway passes them on, once the position is counted."""
        headers = {"Authorization": f"Bearer {self.token}", "Prefer": "wait=30", "Log-Position": position}
        found = self.http.get(f"{self.urls[0]}/v1/events/", params={"limit": 100}, headers=headers)
        assert found.status_code == 200, found.text
        return {event["name"] for event in found.json()["items"]}

    def close(self) -> None:
        """Stop whatever runs."""
        self.http.close()
        for process in (*self.gateways, self.aggregator):
            process.stop()


def usage(name: str, customer: str = "ada") -> dict[str, Any]:
    """One event."""
    return {"name": name, "external_id": name, "external_customer_id": customer, "metadata": {"tokens": 5}}
