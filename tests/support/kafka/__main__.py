"""``make kafka``: a broker to try things with, on fixed ports of this machine, until Ctrl-C."""

import argparse
import signal
import socket
import sys
import tempfile
from pathlib import Path

from tests.support.kafka.cluster import Cluster, running
from tests.support.kafka.jars import VERSIONS, Missing, release

STOPPING = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    """Run until SIGINT or SIGTERM; the data goes with the broker unless --data names a new folder for it."""
    parser = argparse.ArgumentParser(prog="make kafka", description="A real Kafka broker on loopback.")
    parser.add_argument("--version", default="4", help=f"one of {', '.join(VERSIONS)}, or a full version")
    parser.add_argument("--nodes", type=int, default=1, choices=(1, 3))
    parser.add_argument("--data", type=Path, help="a new folder for the data; without it a temporary one")
    parser.add_argument("--port", type=int, default=9092, help="of the first node; the others' follow")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _refuse_taken(options.data, range(options.port, options.port + options.nodes))
        print(f"Kafka {release(options.version)} starts ...", flush=True)
        with tempfile.TemporaryDirectory(prefix="meterstream-kafka-") as temporary:
            folder = options.data or Path(temporary) / "cluster"
            with running(folder, options.version, options.nodes, port=options.port) as cluster:
                _wait_for_the_end(cluster)
    except Missing as reason:
        print(f"make kafka: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Kafka stops.", flush=True)
    return 0


def _wait_for_the_end(cluster: Cluster) -> None:
    """Say what to try, and wait for a signal. Further ones count for nothing: the broker is to close its files."""
    print(f"Kafka listens on {cluster.bootstrap}. Ctrl-C stops it. Try:\n", flush=True)
    print(f"  meterstream kafka init --log kafka://{cluster.bootstrap}", flush=True)
    print(f"  meterstream serve --log kafka://{cluster.bootstrap}\n", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    signal.sigwait(STOPPING)
    print("Kafka stops.", flush=True)


def _refuse_taken(data: Path | None, ports: range) -> None:
    """Raises Missing where another broker listens, to whom everybody would talk, or has its data."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise Missing(f"port {port} is taken ({error.strerror}); give another with --port") from None
    if data is not None and (data / "node-1").exists():
        raise Missing(f"{data} has an earlier broker's data; give a new folder with --data")


if __name__ == "__main__":
    sys.exit(main())
