"""``meterstream serve``: one process that keeps the others alive.

    gateway     accepts events and passes reads on       needs the log
    aggregator  owns the store and answers the reads     needs the log, and the store for itself
    forwarder   hands events on to Polar, if configured  needs the aggregator's answers

``run`` opens the listening socket and hands it to the gateway, so clients wait in the kernel's queue while a gateway
is replaced, and a port in use is known before anything starts. ``Child.keep`` restarts a child that crashed, at first
at once, then with growing pauses up to five seconds. A child that explains itself (exit code 1 or 2) or crashes too
often ends all, unless it is the forwarder. The gateway is stopped first, so that no event is accepted that nobody
would count soon.

Children never outlive the supervisor, not even its SIGKILL: each holds the read end of a pipe and leaves when the
other end is closed, and on Linux the kernel kills it besides (``deploy.server.runtime``).
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import structlog

from deploy.console import note
from deploy.errors import FAILED, USAGE, GiveUp
from deploy.server.control import NotYet, first_start, new_secret, open_control, was_started_before
from deploy.server.data import DataDirectory, data_directory
from deploy.server.runtime import configure_logs, leave_when_asked, listen, live_no_longer_than_supervisor, url
from deploy.settings import Settings, read_environment
from meters.catalogue.access import digest

BROKERS_LOOK_S = 1.0  # between two looks for brokers that are away, or for topics that are not there yet
STOP_PATIENCE_S = 20.0  # a round of the aggregator takes well under a second; a gateway lets its requests finish
CRASHES_MAX = 5  # within the window below: more is a state that a restart does not heal
CRASH_WINDOW_S = 60.0
PAUSES_S = (0.0, 0.2, 1.0, 3.0, 5.0)  # before the first, second ... restart within the window

logger = structlog.get_logger("deploy.serve")


class Child:
    """One process that should always run, with the descriptors that it inherits.

    Without a vital one the whole makes no sense; any other is started again for ever.
    """

    def __init__(
        self, name: str, command: Sequence[str], descriptors: Sequence[int] = (), *, is_vital: bool = True
    ) -> None:
        self.name, self._is_vital = name, is_vital
        self._command = command
        self._descriptors = tuple(descriptors)
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    async def keep(self) -> GiveUp | None:
        """Run it, and run it again; returns when it was stopped (None) or, if it is vital, is beyond help."""
        crashes: list[float] = []
        while True:
            code = await self._run_once()
            if self._stopping.is_set():
                return None
            if code in (FAILED, USAGE) and self._is_vital:
                return GiveUp(f"the {self.name} cannot run; the line above says why", code)
            now = time.monotonic()
            crashes = [moment for moment in crashes if moment > now - CRASH_WINDOW_S] + [now]
            if len(crashes) > CRASHES_MAX and self._is_vital:
                return GiveUp(
                    f"the {self.name} ended {len(crashes)} times within {CRASH_WINDOW_S:.0f} s; what it logged above "
                    "says why, and `meterstream doctor` looks at the data"
                )
            await self._pause(code, PAUSES_S[min(len(crashes), len(PAUSES_S)) - 1])

    async def _run_once(self) -> int:
        # A group of its own: Ctrl-C is the supervisor's, who then stops its children in order.
        self._process = await asyncio.create_subprocess_exec(
            *self._command, pass_fds=self._descriptors, stdin=asyncio.subprocess.DEVNULL, process_group=0
        )
        if self._stopping.is_set():
            self._process.terminate()
        return await self._process.wait()

    async def _pause(self, code: int, pause_s: float) -> None:
        logger.error("child_ended", child=self.name, exit_code=code, restart_in_s=pause_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), pause_s)

    async def stop(self) -> None:
        """Ask it to end, and insist after a while."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_PATIENCE_S)
        except TimeoutError:
            logger.error("child_killed", child=self.name, waited_s=STOP_PATIENCE_S)
            process.kill()
            await process.wait()


class Started(msgspec.Struct, frozen=True):
    """What a person wants to know when it runs."""

    url: str
    data: str
    secret: str | None  # of the token that this start made; over Kafka that comes later
    given: str  # what stands for a secret that was given, where it works; empty if it was drawn here


def run(settings: Settings, lifeline: int | None) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP. Raises GiveUp when it cannot begin or cannot go on."""
    configure_logs("serve", settings.log_level)
    if lifeline is not None:
        live_no_longer_than_supervisor(lifeline)
    leave_when_asked()  # until the loop minds signals
    data = data_directory(settings)
    with data.hold("serve") as lock, contextlib.closing(listen(settings.host, settings.port)) as listener:
        data.check_url()
        secret = _first_secret(data, settings) if data.has_log else None  # brokers may be away for any time
        address = url(settings.host, listener.getsockname()[1])
        started = Started(address, str(data.path), secret, _given(settings))
        lifeline, held_end = os.pipe()
        try:
            children = _children(data, listener, lifeline, lock)
            if settings.polar_token:
                children += (_forwarder(data, lifeline, lock),)
            failure = asyncio.run(_supervise(children, started, lambda: _see_to_token(data, settings, started)))
        finally:
            os.close(held_end)
            os.close(lifeline)
    if failure:
        raise failure


def _given(settings: Settings) -> str:
    """The variable that holds the token, or words in the place of one that no variable of the shell has."""
    if not settings.token:
        return ""
    return "$METERSTREAM_TOKEN" if settings.token == read_environment().token else "<the token you gave>"


def _see_to_token(data: DataDirectory, settings: Settings, started: Started) -> None:
    """What may wait for brokers, or long: the first token, or to say that the given one is not known. Raises GiveUp."""
    secret = None if data.has_log else _first_secret(data, settings)
    if secret is not None:
        _show_token(started, secret)
    elif settings.token and started.secret is None:
        _doubt(data, settings.token)


def _first_secret(data: DataDirectory, settings: Settings) -> str | None:
    """The secret of the first token, if this start made it. Waits for brokers that are away. Raises GiveUp."""
    secret = settings.token or new_secret()
    is_asked, is_told = False, False
    while True:
        try:
            if not is_asked and was_started_before(data):
                return None
            with open_control(data, create=True) as control:
                if is_asked and digest(secret) in control.catalogue.tokens:
                    return secret  # the brokers took it without saying so in time
                is_asked = True
                return first_start(control, secret)
        except NotYet as reason:
            if data.has_log:
                raise
            if not is_told:
                logger.warning("waiting_for_the_log", reason=str(reason))
            is_told = True
            time.sleep(BROKERS_LOOK_S)


def _doubt(data: DataDirectory, token: str) -> None:
    """Say so if nobody knows the token. All decisions are read for that, so nothing waits for it."""
    with contextlib.suppress(GiveUp), open_control(data) as control:
        if digest(token) not in control.catalogue.tokens:
            note("The token that was given is not known here; `meterstream tokens create` makes one.")


def _children(data: DataDirectory, listener: socket.socket, lifeline: int, lock: int) -> tuple[Child, ...]:
    """The gateway and the aggregator. Both hold the directory's lock, so none can be left over unnoticed."""
    program = _program(data)
    common, socket_number = ("--lifeline", str(lifeline)), listener.fileno()
    gateway = (*program, "gateway", *common, "--socket", str(socket_number))
    aggregator = (*program, "aggregate", *common)
    return (
        Child("gateway", gateway, (lifeline, lock, socket_number)),
        Child("aggregator", aggregator, (lifeline, lock)),
    )


def _program(data: DataDirectory) -> tuple[str, ...]:
    """The command line up to the command. Passwords stay in the environment, which children inherit."""
    log = ("--log", data.log_url) if data.log_url else ()
    return (sys.executable, "-m", "deploy.cli", "--data", str(data.path), *log)


def _forwarder(data: DataDirectory, lifeline: int, lock: int) -> Child:
    """What hands events on to Polar; it waits for the aggregator by itself, and nobody ends because of it."""
    command = (*_program(data), "forward", "--lifeline", str(lifeline))
    return Child("forwarder", command, (lifeline, lock), is_vital=False)


async def _supervise(
    children: tuple[Child, ...], started: Started, see_to_token: Callable[[], None]
) -> Exception | None:
    """Run all until one is beyond help or a signal comes. Stopped in order: gateway, whatever else, aggregator."""
    gateway, aggregator, *others = children
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with asyncio.TaskGroup() as group:
        kept = [group.create_task(child.keep()) for child in children]
        asked = group.create_task(stop.wait())
        _greet(started)
        without_token = _beside(see_to_token)
        ends: list[asyncio.Future[Any]] = [asked, without_token, *kept]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        for child in (gateway, *others, aggregator):
            await child.stop()
    if without_token.done():
        return without_token.result()
    return next((failure for task in kept if (failure := task.result())), None)


def _beside(work: Callable[[], None]) -> "asyncio.Future[Exception]":
    """What the work raises, if it does. It has a thread that no stop waits for: brokers take seconds to be away."""
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[Exception] = loop.create_future()

    def run() -> None:
        try:
            work()
        except Exception as error:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody asks any more
                loop.call_soon_threadsafe(failed.set_result, error)

    threading.Thread(target=run, name="token", daemon=True).start()
    return failed


def _greet(started: Started) -> None:
    """Say where it listens, on stdout, apart from the logs; and the token, where it is made already."""
    print(f"Meterstream listens on {started.url}, data in {started.data}. Ctrl-C stops it.", flush=True)
    if started.secret is not None:
        _show_token(started, started.secret)


def _show_token(started: Started, secret: str) -> None:
    """The one place that shows a secret: when the token is made."""
    token = started.given or secret
    quote = '"' if started.given else "'"
    event = '{"events":[{"name":"llm.call","external_customer_id":"ada","metadata":{"tokens":812}}]}'
    shown = "Its token is the one you gave.\n" if started.given else f"Its token, shown this once:\n\n  {token}\n"
    print(
        f"\nThis is the first start: there is now an organization called default. {shown}\n"
        f"Send it an event:\n\n  curl -i {started.url}/v1/events/ingest \\\n"
        f"    -H {quote}Authorization: Bearer {token}{quote} -H 'Content-Type: application/json' \\\n"
        f"    -d '{event}'\n", flush=True,
    )
