"""Render a report as one HTML page for people in finance: no scripts, no external resources, printable. Pure.

``page`` is the entry. Texts from events are untrusted and are escaped like everything else.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from html import escape

from aggregator.reconcile.report import MEANING, Cause, Check, Difference, Done, Repair, Report, signed
from meters.exact import EXACT

TITLES = {
    "log": "Is everything that was taken counted?",
    "store": "Are the totals the sum of the events?",
    "ledger": "Do the balances follow from their entries?",
    "upstream": "Does Polar have what we counted?",
}
WHAT_TO_DO = {
    Repair.REBUILD: "Stop the server and run `meterstream reconcile --repair apply`: the counts are made again from "
                    "the log, which still has everything.",
    Repair.RESTART: "Restart the server: it counts its totals anew from the stored events.",
    Repair.SEND: "Run `meterstream reconcile --repair apply`: the events are sent to Polar again. Each carries its id, "
                 "so nothing can be counted twice.",
    Repair.CORRECT: "Run `meterstream reconcile --repair apply`: Polar cannot remove an event, but another one takes "
                    "back what it counts wrongly, and what is right is sent in its place.",
    Repair.WAIT: "Nothing yet: these events are on their way.",
    Repair.DECIDE: "A person has to decide; the description says between what.",
    Repair.NOTHING: "Nothing.",
}  # fmt: skip
BUCKETS_SHOWN_MAX = 48

_STYLE = """
:root { --ink: #1c2024; --soft: #60646c; --line: #e0e1e6; --good: #18794e; --good-back: #e9f9ee; --bad: #b42318;
  --bad-back: #fff0ee; --back: #fbfcfd; }
* { box-sizing: border-box } body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem } h1 { font-size: 1.5rem; margin: 0 }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .4rem } p { margin: .4rem 0 } .soft { color: var(--soft) }
.verdict { border-radius: .6rem; padding: 1.1rem 1.4rem; margin: 1.4rem 0; border: 1px solid; font-size: 1.05rem }
.verdict strong { display: block; font-size: 1.3rem } .good { background: var(--good-back); border-color: #b7e4c7;
  color: var(--good) } .bad { background: var(--bad-back); border-color: #f5c6c0; color: var(--bad) }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.2rem 0 }
.facts div { background: #fff; border: 1px solid var(--line); border-radius: .6rem; padding: .7rem 1rem }
.facts b { display: block; font-size: 1.15rem } table { border-collapse: collapse; width: 100%; background: #fff;
  border: 1px solid var(--line); margin: .6rem 0 1rem; font-size: .92rem } th { text-align: left; font-weight: 600;
  color: var(--soft); font-size: .8rem } td, th { padding: .45rem .7rem; border-bottom: 1px solid var(--line);
  vertical-align: top } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.wide { overflow-wrap: anywhere } .tag { border-radius: 1rem; padding: .05rem .6rem; font-size: .82rem;
  white-space: nowrap; background: var(--bad-back); color: var(--bad) } .tag.fine { background: var(--good-back);
  color: var(--good) } summary { cursor: pointer; color: var(--soft) } code, .mono { font: .85em ui-monospace, Menlo,
  Consolas, monospace } li { margin: .3rem 0 } @media print { body { background: #fff } details { display: none } }
"""


def page(report: Report) -> str:
    """The report as HTML."""
    verdict = _verdict(report)
    title = "Reconciliation of usage"
    parts = [
        f"<h1>{title}</h1><p class=soft>Made {_time(report.made_at)}. True for everything taken up to log position "
        f"<span class=mono>{escape(report.as_of or '0:0')}</span>, {_range(report)}.</p>",
        verdict,
        _facts(report),
        *(_actions("What was done", report.done),) * bool(report.done),
        *(_actions("What the repair would do", report.plan),) * bool(report.plan and not report.done),
        *((f"<h2>What was found before the repair</h2>{_table(report.mended)}",) if report.mended else ()),
        _next_steps(report),
        *(_check(check) for check in sorted(report.checks, key=lambda check: not check.differences)),
        _glossary(report),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _verdict(report: Report) -> str:
    ran = [check for check in report.checks if not check.skipped]
    explained = sum(check.explained_count for check in ran)
    if not ran:
        return "<div class='verdict bad'><strong>Nothing was compared.</strong></div>"
    if report.is_equal and report.has_failed:
        return "<div class='verdict bad'><strong>Not everything could be compared.</strong>What was, agrees.</div>"
    if report.is_equal:
        also = "".join(f" Not compared: {escape(c.sides)} ({escape(c.skipped)})." for c in report.checks if c.skipped)
        also += f" {_count(explained)} small differences are explained below and need no action." if explained else ""
        return (
            f"<div class='verdict good'><strong>{escape(report.verdict)}.</strong>"
            f"{_count(sum(c.compared for check in ran for c in check.counted))} comparisons, no difference.{also}</div>"
        )
    count = sum(check.unexplained_count for check in ran)
    noun = "difference" if count == 1 else "differences"
    return (
        f"<div class='verdict bad'><strong>{_count(count)} {noun} found.</strong>"
        f"{escape(_stakes(report))}</div>"
    )


def _stakes(report: Report) -> str:
    if report.cents:
        more = f" For {_count(report.unpriced)} more, no price is known." if report.unpriced else ""
        return f"Money at stake by the meters' prices: {money(report.cents)}.{more}"
    if not report.unpriced:
        return "By the meters' prices no money is at stake."
    return "No price is known for the meters concerned; quantities are given instead."


def _facts(report: Report) -> str:
    boxes = []
    for check in report.checks:
        said = "not compared" if check.skipped else "agrees"
        if check.unexplained_count:
            said = f"{_count(check.unexplained_count)} different"
        boxes.append(f"<div><b>{said}</b>{escape(check.sides)}<br><span class=soft>{check.seconds:.1f} s</span></div>")
    boxes.append(f"<div><b>{_at_stake(report)}</b>money at stake<br><span class=soft>unit prices, before credits and "
                 "caps</span></div>")
    return f"<div class=facts>{''.join(boxes)}</div>"


def _at_stake(report: Report) -> str:
    if report.cents is None:
        return "unknown"
    return f"{money(report.cents)} or more" if report.unpriced else money(report.cents)


def _actions(title: str, actions: Sequence[Done]) -> str:
    rows = "".join(f"<li>{escape(action.what)}</li>" for action in actions)
    return f"<h2>{title}</h2><ul>{rows}</ul>"


def _next_steps(report: Report) -> str:
    needed = list(dict.fromkeys(d.repair for d in report.differences if d.repair is not Repair.NOTHING))
    if not needed:
        return ""
    rows = "".join(f"<li>{_code(WHAT_TO_DO[repair])}</li>" for repair in needed)
    return f"<h2>What to do</h2><ul>{rows}</ul>"


def _check(check: Check) -> str:
    head = f"<h2>{TITLES.get(check.name, check.name)}</h2><p class=soft>Compared: {escape(check.sides)}.</p>"
    if check.skipped:
        return head + f"<p>Not compared: {escape(check.skipped)}</p>"
    notes = "".join(f"<p>{escape(note)}</p>" for note in check.notes)
    return head + _differences(check) + notes + _counted(check) + _buckets(check)


def _differences(check: Check) -> str:
    if not check.differences:
        return "<p><span class='tag fine'>no difference</span></p>"
    hidden = check.differences_count - len(check.differences)
    more = f"<p>{_count(hidden)} more are not listed.</p>" if hidden else ""
    return _table(check.differences) + more


def _table(differences: Sequence[Difference]) -> str:
    rows = "".join(_difference(difference) for difference in differences)
    head = _row("th", ["Cause", "Where", "What differs", "Events", "Quantity", "Money"], {3, 4, 5})
    return f"<table>{head}{rows}</table>"


def _difference(found: Difference) -> str:
    window = f"<br><span class=soft>{_time(found.window[0])} to {_time(found.window[1])}</span>" if found.window else ""
    events = ""
    if found.count > 1 and found.events:
        listed = "".join(f"<li class=mono>{escape(event)}</li>" for event in found.events)
        more = f"<li>and {_count(found.count - len(found.events))} more</li>" if found.count > len(found.events) else ""
        events = f"<details><summary>events</summary><ul>{listed}{more}</ul></details>"
    quantities = "<br>".join(f"{signed(amount)} {escape(name)}" for name, amount in found.quantities.items())
    kind = " fine" if found.is_explained else ""
    return (
        f"<tr><td><span class='tag{kind}'>{escape(found.cause)}</span></td><td class=wide>{escape(found.where)}{window}"
        f"</td><td class=wide>{escape(found.what)}{events}</td><td class=number>{_count(found.count)}</td>"
        f"<td class=number>{quantities}</td><td class=number>{stake(found)}</td></tr>"
    )


def _counted(check: Check) -> str:
    if not check.counted:
        return ""
    with_sides = any(one.here or one.there for one in check.counted)
    cells = [[escape(one.what), _count(one.compared), _count(one.different), escape(one.here), escape(one.there)]
             for one in check.counted]  # fmt: skip
    columns, names = (5 if with_sides else 3), ["What was compared", "How many", "Different", "Here", "There"]
    rows = "".join(_row("td", row[:columns], range(1, columns)) for row in cells)
    head = _row("th", names[:columns], range(1, columns))
    return f"<details open><summary>What was compared</summary><table>{head}{rows}</table></details>"


def _buckets(check: Check) -> str:
    if not check.buckets:
        return ""
    unequal = [bucket for bucket in check.buckets if bucket.log_checksum != bucket.store_checksum]
    shown = (unequal or check.buckets)[-BUCKETS_SHOWN_MAX:]
    rows = "".join(
        _row("td", [
            f"{bucket.hour:%Y-%m-%d %H}:00", str(bucket.partition), _count(bucket.lines), _count(bucket.stored),
            _count(bucket.duplicates), _count(bucket.dead), f"<span class=mono>{bucket.log_checksum}</span>",
            "equal" if bucket.log_checksum == bucket.store_checksum
            else f"<span class='mono tag'>{bucket.store_checksum}</span>",
        ], {2, 3, 4, 5})
        for bucket in shown
    )  # fmt: skip
    names = ["Hour (UTC)", "Partition", "Lines", "Stored", "Repeated", "Dead letters", "Checksum of the log", "Store"]
    which = "Hours that differ" if unequal else f"The newest {len(shown)} of {_count(len(check.buckets))} hours"
    table = f"<table>{_row('th', names, {2, 3, 4, 5})}{rows}</table>"
    return f"<details><summary>{which}, by checksum</summary>{table}</details>"


def _glossary(report: Report) -> str:
    causes = [cause for cause in Cause if any(difference.cause is cause for difference in report.differences)]
    if not causes:
        return ""
    rows = "".join(_row("td", [f"<span class=tag>{escape(cause)}</span>", escape(MEANING[cause])]) for cause in causes)
    note = "Quantities are what the second side has more (+) or less (-) than the first."
    return f"<h2>What the causes mean</h2><table>{rows}</table><p class=soft>{note}</p>"


def _row(tag: str, cells: Sequence[str], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)
    kinds = [" class=number" if place in right else "" for place in range(len(cells))]
    return "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"


def stake(found: Difference) -> str:
    """The money that a difference is about; nothing where it moves none, "unknown" where no price is known."""
    return "unknown" if found.is_unpriced else money(found.cents) if found.cents else ""


def money(cents: Decimal) -> str:
    """Cents as dollars."""
    sign = "-" if cents < 0 else ""
    return f"{sign}${EXACT.divide(cents.copy_abs(), 100):,.2f}"


def _range(report: Report) -> str:
    if report.since is None and report.until is None:
        return "from the first event on"
    since = _time(report.since) if report.since else "the first event"
    return f"from {since} to {_time(report.until) if report.until else 'now'}"


def _time(instant: datetime) -> str:
    return f"{instant:%Y-%m-%d %H:%M} UTC"


def _count(count: int) -> str:
    return f"{count:,}"


def _code(text: str) -> str:
    """Escaped, with what stands in backticks as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))
