"""The plots of the page, as SVG files beside the results. The same results give the same bytes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SIZE_INCHES = (7.2, 3.6)
mpl.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "meterstream", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False,
})  # fmt: skip

Rows = Sequence[Mapping[str, Any]]


@contextmanager
def figure(path: Path, title: str, y: str) -> Iterator[Axes]:
    """Axes to draw into; the file is there when the block has ended."""
    made = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = made.subplots()
    axes.set_title(title, loc="left")
    axes.set_ylabel(y)
    yield axes
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter("{x:,g}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    made.savefig(path, metadata={"Date": None})


def accept(rows: Rows, path: Path) -> None:
    """CPU time an event by the size of a body."""
    with figure(path, "Taking an event durably", "CPU time an event, us") as axes:
        for server, gateways in (("usual stack", 1), ("meterstream", 1), ("meterstream", 2)):
            own = [row for row in rows if (row.get("server"), row.get("gateways")) == (server, gateways)]
            label = f"{server}, {gateways} process{'es' if gateways > 1 else ''}"
            axes.plot([row["events a body"] for row in own], [row["CPU us/event"] for row in own], "o-", label=label)
        limited = [row for row in rows if row.get("gateways") == 1 and "parse us" in row]
        if limited:
            floor = [row["parse us"] + row["copy us"] + row["append us"] for row in limited]
            axes.plot([row["events a body"] for row in limited], floor, "k--", label="the machine: parse, copy, append")
        axes.set(xscale="log", yscale="log", xlabel="events a body")


def freshness(rows: Rows, path: Path) -> None:
    """Time from ingestion to the totals by load."""
    with figure(path, "From ingestion to every total", "ms") as axes:
        loaded = [row for row in rows if str(row.get("phase", "")).endswith("of that")]
        rates = [row["events/s"] / 1000 for row in loaded]
        for name in ("fresh p50 ms", "fresh p99 ms", "ack p99 ms"):
            axes.plot(rates, [row[name] for row in loaded], "o-", label=name.removesuffix(" ms"))
        axes.set(xlabel="thousand events a second", xlim=(0, None), ylim=(0, None))


def shapes(rows: Rows, path: Path) -> None:
    """CPU time an event by the shape of the load."""
    with figure(path, "The shape of the load", "") as axes:
        names = [str(row["shape"]).replace(" of the events for ", "\n") for row in rows]
        axes.barh(names, [row["CPU us/event"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("the aggregator's CPU time an event, us")


def history(rows: Rows, path: Path) -> None:
    """Speed and memory by how much is stored."""
    with figure(path, "A long history", "thousand events a second") as axes:
        sized = [row for row in rows if "full speed/s" in row]
        stored = [row["stored"] / 1e6 for row in sized]
        for name in ("drained/s", "full speed/s"):
            axes.plot(stored, [row[name] / 1000 for row in sized], "o-", label=name.removesuffix("/s"))
        axes.plot([], "s:k", label="resident memory (right)")
        axes.set(xlim=(0, None), ylim=(0, None), xlabel="million events stored")
        memory = axes.twinx()
        memory.plot(stored, [row["resident MB"] / 1024 for row in sized], "s:k")
        memory.set(ylim=(0, None), ylabel="GiB")


PLOTS: dict[str, Callable[[Rows, Path], None]] = {
    "accept": accept, "kafka_accept": accept, "freshness": freshness, "shapes": shapes, "history": history,
}  # fmt: skip


def draw(results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """A file for each result that has a plot."""
    for name, plot in PLOTS.items():
        if name in results:
            plot(results[name]["rows"], folder / f"{name}.svg")
