"""One broker of each release for all tests of a run, started by the first that needs it.

Where there can be none, the tests that need one skip, and the end of the run says so; on a machine of continuous
integration (``CI=true``) that is a failure instead.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.support.kafka.cluster import Cluster
from tests.support.kafka.jars import Missing

_running: list[Cluster] = []


def need_kafka(reason: Missing) -> None:
    """Skip the test, or fail it where brokers must be."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"the tests on a real Kafka broker must run here, but {reason}")
    pytest.skip(f"no Kafka broker: {reason}")


@functools.cache
def _started(version: str) -> Cluster | Missing:
    folder = Path(tempfile.mkdtemp(prefix="meterstream-kafka-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        cluster = Cluster(folder / "cluster", version)
    except Missing as reason:
        return reason
    _running.append(cluster)
    cluster.start()
    return cluster


def shared_broker(version: str = "4") -> Cluster:
    """The run's broker of that release. Use topics of your own; never stop it. Skips or fails the test without one."""
    found = _started(version)
    if isinstance(found, Missing):
        need_kafka(found)
    assert isinstance(found, Cluster)
    return found


def stop_brokers() -> None:
    """At the end of a run."""
    while _running:
        _running.pop().stop()
