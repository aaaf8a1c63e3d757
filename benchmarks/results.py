"""A file of rows, and the figures made of it. Rows hold every round's time, so that another question can be asked of them later."""

import csv
import json
import math
import statistics
from pathlib import Path

from .cases import Case, is_ours

FOLDER = Path(__file__).parent / "results"


def quantile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))]


class Row:
    """One row of a file, with what is asked of it."""

    def __init__(self, data, file):
        self.data, self.case = data, Case(**data["case"])
        sitting = file["earlier"][data["sitting"]] if "sitting" in data else file
        self.ceiling = sitting["ceilings"][f"{self.case.dtype} {self.case.threads}"]
        self.names = list(data["passes"][0])
        self.base = self.names[0]

    def matches(self, name):
        judged = self.data["judged"].get(name)
        return judged is None or judged["match"]

    def times(self, name):
        return [t for times in self.data["passes"] for t in times.get(name, ()) if t is not None]

    def median(self, name):
        return statistics.median(self.times(name))

    def ratios(self, name, other):
        """Of each pass: the median of the rounds' own ratios."""
        found = []
        for times in self.data["passes"]:
            pairs = [a / b for a, b in zip(times.get(name, ()), times.get(other, ())) if a is not None and b is not None]
            found += [statistics.median(pairs)] if pairs else []
        return found

    def ratio(self, name, other):
        found = self.ratios(name, other)
        return math.exp(statistics.mean(map(math.log, found))) if found else None

    @property
    def ours(self):
        """The names of this library's contenders whose results are right; what is only there to be compared with is not among them."""
        return [name for name in self.names if is_ours(name) and name in self.data["judged"] and self.matches(name)]

    @property
    def best(self):
        """This library's fastest contender, or None where none is right."""
        return min(self.ours, key=self.median, default=None)

    @property
    def others(self):
        return [name for name in self.names if not is_ours(name) and name != self.base and self.matches(name)]

    def roofline(self, name):
        """The share of what the machine's own ceilings allow: the longer of moving the bytes and of the products, over the time."""
        floor = max(self.data["bytes"] / max(self.ceiling["copy"], self.ceiling["read"]), self.data["flops"] / self.ceiling["matmul"])
        return floor / self.median(name)

    def losses(self):
        """[(other, ratio)] of whoever is faster than the best of ours."""
        return [(name, self.ratio(self.best, name)) for name in self.others if self.best and self.ratio(self.best, name) > 1]


def load(path):
    try:
        data = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or not {"header", "ceilings", "rows"} <= data.keys():
        raise ValueError(f"{path}: expected a file that `python -m benchmarks run --json` wrote")
    return data


def rows_of(data):
    return [Row(row, data) for row in data["rows"]]


def save(data, path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=None, separators=(",", ":")).replace('{"case"', '\n{"case"') + "\n")
    return path


def place(header):
    """benchmarks/results/<device>/<date>-<revision>.json"""
    device = "cpu" if header["timings"].startswith("CPU") else header["device"].lower().replace(" ", "-")
    return FOLDER / device / f"{header['date'][:10]}-{header['revision'].rstrip('+')}.json"


def newest():
    found = sorted(FOLDER.glob("*/*.json"), key=lambda path: load(path)["header"]["date"])
    if not found:
        raise FileNotFoundError(f"no results below {FOLDER}: run `python -m benchmarks run --save` first")
    return found[-1]


COLUMNS = ("op", "mode", "shapes", "M", "K", "N", "R", "dtype", "adapter", "p", "adapters", "rows", "cache", "launch", "threads")


def write_csv(data, path):
    """A line for each contender of each row."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*COLUMNS, "contender", "median_ms", "p10_ms", "p90_ms", "times_base", "error_over_eager", "match", "tflops", "gbs", "roofline", "peak_bytes", "kept_bytes", "launches"])
        for row in rows_of(data):
            for name in row.names:
                times, judged, memory = row.times(name), row.data["judged"].get(name, {}), row.data["memory"].get(name, {})
                timed = [1e3 * row.median(name), 1e3 * quantile(times, 0.1), 1e3 * quantile(times, 0.9), row.ratio(name, row.base)] if row.matches(name) and times else [""] * 4
                speed = [row.data["flops"] / row.median(name) / 1e12, row.data["bytes"] / row.median(name) / 1e9, row.roofline(name)] if timed[0] != "" else [""] * 3
                out.writerow([*(getattr(row.case, c) for c in COLUMNS), name, *timed, judged.get("error", ""), judged.get("match", ""), *speed, *(memory.get(k, "") for k in ("peak", "kept", "launches"))])
