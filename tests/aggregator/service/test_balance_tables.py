"""What happens to an account, in tables that a bookkeeper can read."""

import re
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from tests.support.account_tables import Book
from tests.support.records import line
from tests.support.servers.query_api import Server

GRANT_AND_USE = """
day  what happens               credited  consumed  balance
1    grant plan 100                  100         0      100
2    use 30                          100        30       70
3    use 12.5                        100      42.5     57.5
4    use 60                          100     102.5     -2.5
"""

CYCLE = """
day  what happens               credited  consumed  balance
1    grant plan 100                  100         0      100
20   use 80                          100        80       20
31   cycle plan                      100         0      100
32   use 10                          100        10       90
"""

ROLLOVER = """
day  what happens               credited  consumed  balance
1    grant plan 100                  100         0      100
1    grant topup 50 rollover         150         0      150
31   cycle plan                      150         0      150
40   use 120                         150       120       30
61   cycle plan                      130         0      130
62   use 145                         130       145      -15
91   cycle plan                      100         0      100
"""

EVERYTHING_ROLLS_OVER = """
day  what happens               credited  consumed  balance
1    grant plan 100 rollover         100         0      100
10   use 30.5                        100      30.5     69.5
31   cycle plan                      169         0      169
"""

REVOKE = """
day  what happens               credited  consumed  balance
1    grant plan 100                  100         0      100
2    use 30                          100        30       70
3    revoke plan                       0        30      -30
4    grant other 50                   50        30       20
"""

REVOKE_FALLS_TO_ZERO = """
day  what happens               credited  consumed  balance
1    give 100                        100         0      100
2    take back                         0         0        0
3    take back                         0         0        0
4    give 50                          50         0       50
"""

UPGRADE_WITHOUT_RESET = """
day  what happens               credited  consumed  balance
1    grant small 100                 100         0      100
10   use 80                          100        80       20
11   revoke small                      0        80      -80
11   grant large 1000               1000        80      920
"""

FAILED_PAYMENT = """
day  what happens               credited  consumed  balance
1    grant plan 100                  100         0      100
1    grant topup 20 rollover         120         0      120
20   use 90                          120        90       30
31   reset                            20         0       20
32   use 25                           20        25       -5
35   cycle plan                      120        25       95
"""

LATE_NEWS_OF_A_RESET = """
day  what happens               credited  consumed  balance
1    grant plan 100                  100         0      100
20   use 90                          100        90       10
32   use 7                           100        97        3
33   reset from 31                     0         7       -7
33   reset from 31                     0         7       -7
34   use 1                             0         8       -8
"""

LATE_EVENTS = """
day  what happens               credited  consumed  balance
1    grant plan 100                  100         0      100
20   use 90                          100        90       10
31   cycle plan                      100         0      100
32   use 5 from 19                   100         5       95
"""

NEGATIVE_USAGE = """
day  what happens               credited  consumed  balance
1    use -10                           0       -10       10
2    use 3                             0        -7        7
3    give 5                            5        -7       12
4    reset                             0         0        0
"""

CENTS_OF_UNITS = """
day  what happens               credited  consumed  balance
1    use 0.1                           0       0.1     -0.1
1    use 0.2                           0       0.3     -0.3
2    give 1                            1       0.3      0.7
2    use 0.000000000001                1  0.300000000001  0.699999999999
3    use 999999999999999999    1  999999999999999999.300000000001  -999999999999999998.300000000001
"""

MAXIMUM = """
day  what happens               credited  consumed  balance
1    grant plan 10                    10         0       10
2    use 4                            10         4        6
3    use 2                            10         4        6
4    use 7                            10         7        3
31   cycle plan                       10         0       10
32   use 3                            10         3        7
33   reset from 32                     0         3       -3
"""

AVERAGE = """
day  what happens               credited  consumed  balance
1    give 10                          10         0       10
2    use 4                            10         4        6
3    use 7                            10       5.5      4.5
4    reset                             0         0        0
5    use 1                             0         1       -1
"""

DISTINCT = """
day  what happens               credited  consumed  balance
1    give 10                          10         0       10
2    use 4                            10         1        9
3    use 4.0                          10         1        9
4    use 5                            10         2        8
31   reset                             0         0        0
32   use 4                             0         1       -1
33   use 6                             0         2       -2
34   reset from 33                     0         1       -1
"""

ONE_PLAN_ENDS_WITH_THE_PERIOD = """
day  what happens               credited  consumed  balance
1    grant A 100                     100         0      100
1    grant B 200                     300         0      300
31   cycle B                         200         0      200
31   revoke A                        200         0      200
32   use 150                         200       150       50
"""

ONE_PLAN_ENDS_BEFORE_NEWS_OF_THE_PERIOD = """
day  what happens               credited  consumed  balance
1    grant A 100                     100         0      100
1    grant B 200                     300         0      300
32   revoke A                        200         0      200
32   cycle B from 31                 200         0      200
"""

A_PLAN_ENDS_AFTER_A_RESET = """
day  what happens               credited  consumed  balance
1    grant plan 100                  100         0      100
1    give 50 rollover                150         0      150
31   reset                            50         0       50
32   revoke plan                      50         0       50
33   reset                            50         0       50
"""

A_PLAN_ENDS_BEFORE_NEWS_OF_A_RESET = """
day  what happens               credited  consumed  balance
1    grant plan 100                  100         0      100
1    give 50 rollover                150         0      150
32   revoke plan                      50         0       50
33   reset from 31                    50         0       50
33   reset from 32                    50         0       50
"""

WHAT_A_LATE_RESET_CARRIES = """
day  what happens               credited  consumed  balance
1    grant plan 100                  100         0      100
1    give 50 rollover                150         0      150
20   use 80                          150        80       70
32   revoke plan                      50        80      -30
33   reset from 31                    50         0       50
"""

TAKEN_BACK_BEFORE_NEWS_OF_THE_PERIOD = """
day  what happens               credited  consumed  balance
1    polar grants 100                100         0      100
1    give 70                         170         0      170
32   take back 70                    100         0      100
33   polar renews 100 from 31        100         0      100
"""

TAKEN_BACK_AFTER_NEWS_OF_THE_PERIOD = """
day  what happens               credited  consumed  balance
1    polar grants 100                100         0      100
1    give 70 rollover                170         0      170
20   use 150                         170       150       20
31   polar renews 100 from 31        120         0      120
32   take back 70                    100         0      100
"""

OF_CARRIED_UNITS_THE_OLDEST_ARE_USED_FIRST = """
day  what happens               credited  consumed  balance
1    give 50 rollover                 50         0       50
2    give 70 rollover                120         0      120
3    use 60                          120        60       60
31   reset                            60         0       60
32   give 5                           65         0       65
33   take back 70                      5         0        5
"""

ONLY_WHAT_WAS_CARRIED_IS_TAKEN_BACK = """
day  what happens               credited  consumed  balance
1    give 50 rollover                 50         0       50
2    give 70 rollover                120         0      120
3    use 20                          120        20      100
31   reset                           100         0      100
32   use 10                          100        10       90
33   take back 50                     70        10       60
61   reset                            60         0       60
62   take back 70                      0         0        0
"""

A_RESET_BEFORE_NEWS_OF_THE_PERIOD = """
day  what happens               credited  consumed  balance
1    polar grants 100 rollover       100         0      100
10   use 30                          100        30       70
32   use 10                          100        40       60
40   reset                            60         0       60
41   polar renews 100 rollover from 31   160     0      160
"""

A_RESET_AFTER_NEWS_OF_THE_PERIOD = """
day  what happens               credited  consumed  balance
1    polar grants 100 rollover       100         0      100
10   use 30                          100        30       70
32   use 10                          100        40       60
33   polar renews 100 rollover from 31   170    10      160
40   reset                           160         0      160
"""

A_CYCLE_AND_A_RESET_OF_AN_EARLIER_TIME = """
day  what happens               credited  consumed  balance
1    grant plan 100 rollover         100         0      100
10   use 30                          100        30       70
32   use 90                          100       120      -20
61   cycle plan                      100         0      100
62   reset from 31                   100         0      100
63   use 7                           100         7       93
"""

GIVEN_HERE_AND_AT_POLAR = """
day  what happens               credited  consumed  balance
1    polar grants 100                100         0      100
1    grant local 40 rollover         140         0      140
10   use 120                         140       120       20
31   polar renews 100 from 31        120         0      120
32   revoke local                    100         0      100
"""

MONTH_AFTER_MONTH = """
day  what happens               credited  consumed  balance
1    grant plan 100                  100         0      100
2    cycle plan                      100         0      100
31   use 30                          100        30       70
32   cycle plan                      100         0      100
62   cycle plan                      100         0      100
63   use 7                           100         7       93
"""

GIVEN_AFTER_A_RESET_THAT_IS_TOLD_LATE = """
day  what happens               credited  consumed  balance
1    give 30 rollover                 30         0       30
40   give 70 rollover                100         0      100
41   reset from 31                   100         0      100
42   reset                           100         0      100
"""

TAKEN_BACK_ROLLS_OVER_NO_MORE = """
day  what happens               credited  consumed  balance
1    give 50 rollover                 50         0       50
1    give 20                          70         0       70
2    take back 50                     20         0       20
31   reset                             0         0        0
32   reset                             0         0        0
"""

TABLES = {
    "grant and use": (GRANT_AND_USE, {}),
    "cycle": (CYCLE, {}),
    "rollover": (ROLLOVER, {}),
    "everything rolls over": (EVERYTHING_ROLLS_OVER, {}),
    "revoke": (REVOKE, {}),
    "a credit taken back": (REVOKE_FALLS_TO_ZERO, {}),
    "upgrade without reset": (UPGRADE_WITHOUT_RESET, {}),
    "a payment that fails": (FAILED_PAYMENT, {}),
    "late news of a reset": (LATE_NEWS_OF_A_RESET, {}),
    "late events": (LATE_EVENTS, {}),
    "negative usage": (NEGATIVE_USAGE, {}),
    "every digit": (CENTS_OF_UNITS, {}),
    "one plan ends with the period": (ONE_PLAN_ENDS_WITH_THE_PERIOD, {}),
    "one plan ends before news of the period": (ONE_PLAN_ENDS_BEFORE_NEWS_OF_THE_PERIOD, {}),
    "a plan ends after a reset": (A_PLAN_ENDS_AFTER_A_RESET, {}),
    "a plan ends before news of a reset": (A_PLAN_ENDS_BEFORE_NEWS_OF_A_RESET, {}),
    "what a late reset carries": (WHAT_A_LATE_RESET_CARRIES, {}),
    "taken back before news of the period": (TAKEN_BACK_BEFORE_NEWS_OF_THE_PERIOD, {}),
    "taken back after news of the period": (TAKEN_BACK_AFTER_NEWS_OF_THE_PERIOD, {}),
    "of carried units the oldest are used first": (OF_CARRIED_UNITS_THE_OLDEST_ARE_USED_FIRST, {}),
    "only what was carried is taken back": (ONLY_WHAT_WAS_CARRIED_IS_TAKEN_BACK, {}),
    "a reset before news of the period": (A_RESET_BEFORE_NEWS_OF_THE_PERIOD, {}),
    "a reset after news of the period": (A_RESET_AFTER_NEWS_OF_THE_PERIOD, {}),
    "a cycle and a reset of an earlier time": (A_CYCLE_AND_A_RESET_OF_AN_EARLIER_TIME, {}),
    "given here and at Polar": (GIVEN_HERE_AND_AT_POLAR, {}),
    "month after month": (MONTH_AFTER_MONTH, {}),
    "given after a reset that is told late": (GIVEN_AFTER_A_RESET_THAT_IS_TOLD_LATE, {}),
    "taken back rolls over no more": (TAKEN_BACK_ROLLS_OVER_NO_MORE, {}),
    "maximum": (MAXIMUM, {"func": "max", "property": "units"}),
    "average": (AVERAGE, {"func": "avg", "property": "units"}),
    "distinct values": (DISTINCT, {"func": "unique", "property": "units"}),
}


@pytest.mark.parametrize("name", TABLES)
def test_an_account_is_kept_as_the_table_says(server: Server, name: str) -> None:
    """After every line the customer meter says what the table says, and its movements add up to it."""
    table, aggregation = TABLES[name]
    Book(server, **aggregation).check(table)


def test_the_example_of_the_page_is_true(server: Server) -> None:
    """The table on the page about balances is kept like any other."""
    text = (Path(__file__).parents[3] / "aggregator" / "service" / "balances.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^```\n(day  what happens.*?)^```", text, re.DOTALL | re.MULTILINE)
    Book(server).check(table)


def test_a_statement_names_every_cause(server: Server) -> None:
    """Grants, usage, resets, what rolled over, renewals: each movement says why."""
    book = Book(server)
    book.check(ROLLOVER)
    assert book.causes() == [
        "grant", "grant", "reset", "cycle", "rollover", "usage", "reset", "cycle", "rollover", "usage", "reset",
        "cycle",
    ]  # fmt: skip


def test_a_late_reset_divides_the_usage_of_a_quarter_hour(server: Server) -> None:
    """What arrived before the cut is in the old window's entry, what arrived after it in the new one's."""
    book = Book(server)
    book.check(LATE_NEWS_OF_A_RESET)
    entries = book.tenant.get(f"/v1/customer-meters/{book.id}/ledger")["items"]
    used = [entry for entry in entries if entry["cause"] == "usage"]
    assert [entry["events"] for entry in used] == [1, 1, 1]
    behind = [
        [event["metadata"]["units"] for event in book.tenant.get(
            f"/v1/customer-meters/{book.id}/ledger/{entry['id']}/events"
        )["items"]]
        for entry in used
    ]  # fmt: skip
    assert behind == [[1], [7], [90]]


def test_behind_an_entry_are_the_events_that_it_counts(server: Server) -> None:
    """As many as it says, each as lists show it; one whose parent never comes counts, so it is there, without one."""
    book = Book(server)
    book.tenant.event("root", name="root", metadata='{"units":1}')
    book.tenant.event("child", name="child", parent_id="root", metadata='{"units":2}')
    server.now += timedelta(hours=1)
    book.tenant.send(
        line("leaf", name="leaf", parent_id="child", metadata='{"units":3}'),
        line("orphan", name="orphan", parent_id="never", metadata='{"units":4}'),
    )
    entries = book.tenant.get(f"/v1/customer-meters/{book.id}/ledger")["items"]
    pages = [book.tenant.get(f"/v1/customer-meters/{book.id}/ledger/{entry['id']}/events") for entry in entries]
    assert [page["pagination"]["total_count"] for page in pages] == [entry["events"] for entry in entries] == [2, 2]
    shown = {event["name"]: event for page in pages for event in page["items"]}
    assert {name: event["parent_id"] for name, event in shown.items()} == {
        "root": None, "child": book.tenant.id_of("root"), "leaf": book.tenant.id_of("child"), "orphan": None,
    }  # fmt: skip
    listed = {event["name"]: event for event in book.tenant.get("/v1/events/")["items"]}
    assert [event["child_count"] for event in listed.values()] == [0, 1, 2]
    assert {name: event for name, event in shown.items() if name != "orphan"} == listed


def test_behind_distinct_values_are_all_events_that_the_meter_takes(server: Server) -> None:
    """Those that repeat a value or have none are counted in the entry, too, and change nothing else."""
    book = Book(server, func="unique", property="units")
    book.tenant.send(*[line(f"{number}", metadata='{"units":"x"}') for number in range(5)], line("none"))

    (entry,) = book.tenant.get(f"/v1/customer-meters/{book.id}/ledger")["items"]

    behind = book.tenant.get(f"/v1/customer-meters/{book.id}/ledger/{entry['id']}/events")["pagination"]["total_count"]
    assert (entry["events"], behind) == (6, 6)
    assert Decimal(entry["units"]) == -1
