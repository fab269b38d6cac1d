"""A Celery worker whose tasks are metered by the time they take.

The client is made once, where the module is imported; the pool's processes, which are forks, each get a thread and a
spool's file of their own. A task names its event after itself and its attempt: delivered twice, it counts once; tried
again, the second attempt counts, too. Celery's processes end without a farewell, so they close the client when Celery
says so; one that is killed leaves its events to the others.

    RENDER_URL=http://127.0.0.1:8000 RENDER_TOKEN=... RENDER_SPOOL=... RENDER_BROKER=... \
        celery -A tests.examples.worker worker
"""

import os
import time
from typing import Any

from celery import Celery
from celery.signals import worker_process_shutdown

from ingest.client import Ingestion
from ingest.client.strategies.delta_time import DeltaTime

folder = os.environ["RENDER_BROKER"]  # messages as files, so that the example needs no broker
app = Celery("render", broker="filesystem://")
app.conf.broker_transport_options = {
    "data_folder_in": folder, "data_folder_out": folder, "control_folder": f"{folder}/control",
}  # fmt: skip
app.conf.task_acks_late = True

ingestion = Ingestion(
    os.environ["RENDER_TOKEN"], base_url=os.environ["RENDER_URL"], spool=os.environ["RENDER_SPOOL"],
    handle_sigterm=False,  # Celery does
)  # fmt: skip
render_time = ingestion.strategy(DeltaTime, "render", quality="high")


@worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def send_the_rest(**arguments: Any) -> None:
    """The end of one of the pool's processes."""
    ingestion.close()


@app.task(bind=True, max_retries=3, default_retry_delay=0.01)  # type: ignore[untyped-decorator]
def render(self: Any, customer: str, frames: int) -> None:
    """Renders, and fails the first time if there are many frames."""
    attempt = f"{self.request.id}:{self.request.retries}"
    with render_time.measure(customer, external_id=attempt, frames=frames):
        time.sleep(frames / 1000)
        if frames > 5 and not self.request.retries:
            raise self.retry()
