"""Two files of results: is the second slower?

A row's figure in a pass is the median over its rounds of log(ours / geometric mean of all others in that round), so that a machine
that is slower today weighs on both sides. Passes make everything anew, so how they differ, over all rows of both files, is the
noise of one figure. A row alarms where it is slower by more than that noise explains among so many rows, and by SMALL at least; all rows
together alarm by their mean, which sees a general slow-down that no row alone shows. A result that was right and is now wrong alarms.
"""

import math
import statistics
import sys

from .cases import is_ours
from .results import load, rows_of

# What does not alarm by itself, however quiet the passes were. Two cores of a shared machine, 20 runs of the same code and 20 with
# 10 % planted, 8 rows and 20 s each: over the 380 pairs of the former the mean of the rows moved by 4.9 % at most, over the 400 of
# both by 5.1 % at least; with these values none of the 380 alarms and every one of the 400 does.
SMALL = 0.15  # of a row
SMALL_MEAN = 0.05  # of the mean of all rows
LIKELY = 0.002  # a false alarm in so many comparisons, for the rows together and for their mean


def figures(row):
    """One figure for each pass, or none where nothing of ours is timed beside others."""
    ours = "lorakernels"
    if ours not in row.names or not row.matches(ours):
        return []
    others = [name for name in row.names if not is_ours(name)]
    found = []
    for times in row.data["passes"]:
        rounds = [i for i, mine in enumerate(times.get(ours, ())) if mine is not None]
        complete = [name for name in others if name in times and all(times[name][i] is not None for i in rounds)]
        if complete and rounds:
            logs = {name: [math.log(times[name][i]) for i in rounds] for name in (ours, *complete)}
            found.append(statistics.median(mine - statistics.mean(rest) for mine, *rest in zip(*logs.values())))
    return found


def compare(a, b):
    """(alarms, notes, mean change) as texts and a log ratio; raises ValueError where the two share no row."""
    rows_a, rows_b = ({row.case.key(): row for row in rows_of(data)} for data in (a, b))
    shared = {key: (figures(rows_a[key]), figures(rows_b[key])) for key in rows_a if key in rows_b}
    alarms = [f"{key}: was right, is now wrong" for key in shared if rows_a[key].matches("lorakernels") and not rows_b[key].matches("lorakernels")]
    shared = {key: pair for key, pair in shared.items() if all(pair)}
    if not shared:
        raise ValueError("the two files share no row in which this library was timed beside others")
    squares = [(value - statistics.mean(side)) ** 2 for pair in shared.values() for side in pair for value in side if len(side) > 1]
    freedom = sum(len(side) - 1 for pair in shared.values() for side in pair)
    changes = {key: statistics.mean(after) - statistics.mean(before) for key, (before, after) in shared.items()}
    if freedom >= 4:
        noise = math.sqrt(sum(squares) / freedom)
        errors = {key: noise * math.sqrt(1 / len(before) + 1 / len(after)) for key, (before, after) in shared.items()}
    else:  # single passes: how the rows' changes differ among themselves
        middle = statistics.median(changes.values())
        errors = dict.fromkeys(changes, max(0.03, 1.48 * statistics.median(abs(c - middle) for c in changes.values())))
    normal = statistics.NormalDist()
    far = normal.inv_cdf(1 - LIKELY / len(shared))
    notes = []
    for key, change in sorted(changes.items(), key=lambda item: -item[1]):
        text = f"{100 * math.expm1(change):+6.1f} % (noise {100 * errors[key]:.1f} %)  {key}"
        if change > max(far * errors[key], math.log1p(SMALL)):
            alarms.append(text)
        else:
            notes.append(text)
    mean = statistics.mean(changes.values())
    error = statistics.mean(errors.values()) / math.sqrt(len(changes))
    if mean > max(normal.inv_cdf(1 - LIKELY) * error, math.log1p(SMALL_MEAN)):
        alarms.append(f"{100 * math.expm1(mean):+6.1f} % (noise {100 * error:.1f} %)  mean of {len(changes)} rows")
    for key in sorted(rows_a.keys() - rows_b.keys()):
        notes.append(f"only in the first file: {key}")
    for key in sorted(rows_b.keys() - rows_a.keys()):
        notes.append(f"only in the second file: {key}")
    return alarms, notes, mean


def main(a, b):
    a, b = load(a), load(b)
    if a["header"]["device"] != b["header"]["device"]:
        print(f"different devices: {a['header']['device']} and {b['header']['device']}", file=sys.stderr)
    alarms, notes, mean = compare(a, b)
    for note in notes:
        print(note)
    print(f"time over all others', mean of rows: {100 * math.expm1(mean):+.1f} %")
    for alarm in alarms:
        print("SLOWER" if "%" in alarm else "WRONG", alarm)
    return 1 if alarms else 0
