"""``make kafka``: a broker to try things with, on fixed ports of this machine, until Ctrl-C."""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tests.kafka.cluster import running
from tests.kafka.jars import VERSIONS, Missing, release


def main() -> int:
    """Run until SIGINT or SIGTERM; the data goes with the broker unless --data names a new folder for it."""
    parser = argparse.ArgumentParser(prog="make kafka", description="A real Kafka broker on loopback.")
    parser.add_argument("--version", default="4", help=f"one of {', '.join(VERSIONS)}, or a full version")
    parser.add_argument("--nodes", type=int, default=1, choices=(1, 3))
    parser.add_argument("--data", type=Path, help="a new folder for the data; without it a temporary one")
    parser.add_argument("--port", type=int, default=9092, help="of the first node; the others' follow")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"Kafka {release(options.version)} starts ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="meterstream-kafka-") as temporary:
        try:
            folder = options.data or Path(temporary) / "cluster"
            with running(folder, options.version, options.nodes, port=options.port) as cluster:
                print(f"Kafka listens on {cluster.bootstrap}. Ctrl-C stops it. Try:\n", flush=True)
                print(f"  meterstream kafka init --log kafka://{cluster.bootstrap}", flush=True)
                print(f"  meterstream serve --log kafka://{cluster.bootstrap}\n", flush=True)
                signal.pause()
        except Missing as reason:
            print(f"make kafka: {reason}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("Kafka stops.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
