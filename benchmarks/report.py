"""What is shown of a file of results: tables, RESULTS.md, plots."""

from pathlib import Path

from .cases import is_ours
from .marks import marks, met
from .results import load, quantile, rows_of

MIB = 2**20
TITLES = {"lora": "LoRA", "nf4": "NF4 and QLoRA", "multi": "many adapters", "model": "layers and models"}
COLUMNS = ("row", "who", "median ms", "p10 – p90", "÷ base", "÷ ours", "error ÷ eager's", "TFLOP/s", "GB/s", "roofline", "peak MiB", "kept MiB", "launches")


def about(data):
    """Lines that say what was measured where."""
    header = data["header"]
    yield f"{header['timings']}: {header['device']}, {header['threads']} threads at most, revision {header['revision']}"
    yield f"lorakernels {header['lorakernels']} ({header['native kernels']}), torch {header['torch']}, Python {header['python']}, {header['system']}"
    yield "others: " + (", ".join(f"{name} {version}" for name, version in header["peers"].items()) or "none installed")
    for key in ("clock", "gpu", "cuda", "triton"):
        if header.get(key):
            yield f"{key}: {header[key]}"
    sittings = [*data.get("earlier", ()), data]
    for number, sitting in enumerate(sittings):
        rows = sum(row.get("sitting", len(sittings) - 1) == number for row in data["rows"])
        if not rows:
            continue
        yield f"{sitting['header']['date']}, load {sitting['header']['load']}: {rows} rows, with these ceilings"
        for key, ceiling in sitting["ceilings"].items():
            dtype, threads = key.split()
            place = f", {threads} thread{'s' * (threads != '1')}" if threads != "0" else ""
            yield f"{dtype}{place}: copy {ceiling['copy'] / 1e9:.1f} GB/s, read {ceiling['read'] / 1e9:.1f} GB/s, product {ceiling['matmul'] / 1e12:.3f} TFLOP/s"
    if data["interrupted"]:
        yield "interrupted: the rows below were done"
    if data["left_out"]:
        yield f"{len(data['left_out'])} rows did not fit the budget"
    for failed in data.get("failed", ()):
        yield f"FAILED: {failed}"


def where(case):
    place = f"{case.threads} thread{'s' * (case.threads > 1)}" if case.threads else case.launch
    return f"{case.mode} {case.label()}, {case.dtype}{f'+{case.adapter}' if case.adapter != case.dtype else ''}, {case.cache}, {place}"


def ratio(value):
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def lines(row):
    """A line for each contender: its cells after the first."""
    for name in row.names:
        judged, memory, times = row.data["judged"].get(name), row.data["memory"].get(name, {}), row.times(name)
        kept = [f"{memory[key] / MIB:.1f}" if memory.get(key) is not None else "" for key in ("peak", "kept")] + [str(memory.get("launches") or "")]
        error = "base" if judged is None and name == row.base else "other work" if judged is None else f"{judged['error']:.2f}" + ("" if judged["match"] else " WRONG")
        if not row.matches(name):
            yield [name, "", "", "", "", error, "", "", "", *kept]
            continue
        spread = f"{1e3 * quantile(times, 0.1):.3f} – {1e3 * quantile(times, 0.9):.3f}"
        over = ratio(row.ratio(name, row.best)) if row.best and name != row.best else ""
        speed = [f"{row.data['flops'] / row.median(name) / 1e12:.3f}", f"{row.data['bytes'] / row.median(name) / 1e9:.1f}", f"{100 * row.roofline(name):.0f} %"]
        yield [name, f"{1e3 * row.median(name):.3f}", spread, ratio(row.ratio(name, row.base)), over, error, *speed, *kept]


def notes(rows, isa):
    """(marks met, marks missed, losing rows, skipped), as lines."""
    reached, missed, losing, skipped = [], [], [], {}
    for row in rows:
        for mark in marks(row, isa):
            measure, value, bound, higher = mark
            text = f"{row.case.op} {where(row.case)}: {measure} {value:.3f} ({'at least' if higher else 'at most'} {bound:g})"
            (reached if met(mark) else missed).append(text)
        losing += [f"{row.case.op} {where(row.case)}: {row.best} takes {value:.3f} × {name}" for name, value in row.losses()]
        if row.best is None:
            losing.append(f"{row.case.op} {where(row.case)}: this library's result is WRONG")
        for name, reason in row.data["skipped"].items():
            skipped.setdefault((name, reason), []).append(row)
    return reached, missed, losing, [f"{name}: {reason} ({len(those)} rows)" for (name, reason), those in skipped.items()]


def sections(rows, isa):
    reached, missed, losing, skipped = notes(rows, isa)
    yield "Marks of the design that were not reached", missed, "none"
    yield "Rows that lose to someone", losing, "none"
    yield "Marks of the design that were reached", reached, "none"
    yield "Who was left out, and why", skipped, "nobody"


def text(data):
    """All of it for a terminal of 160 columns."""
    out, rows = [*about(data)], rows_of(data)
    form = "  {:26} {:>10} {:>19} {:>8} {:>8} {:>16} {:>8} {:>8} {:>8} {:>9} {:>9} {:>8}"
    for op in dict.fromkeys(row.case.op for row in rows):
        out += ["", TITLES[op], form.format(*COLUMNS[1:])]
        for row in (row for row in rows if row.case.op == op):
            out += [where(row.case), *(form.format(*cells).rstrip() for cells in lines(row))]
    for title, texts, nothing in sections(rows, data["header"]["native kernels"]):
        out += ["", title, *("  " + text for text in texts or [nothing])]
    return "\n".join(out)


def write(path, folder=None):
    """RESULTS.md of a file, with its plots beside it. Returns what was written."""
    data = load(path)
    folder = Path(folder or Path(__file__).parent).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots(data, Path(path).with_suffix("") if folder == Path(__file__).resolve().parent else folder)
    rows, text = rows_of(data), ["# Benchmark results", "", *(f"{line}  " for line in about(data)), ""]
    text += ["Times of all rounds of all passes, contenders in turn; ÷ base and ÷ ours: the median of the rounds' own ratios. The error is the", "largest of a row's results against float64, over that of PEFT's eager formula in the same dtypes; where it breaks the tests' error", "rule the row says WRONG and shows no time. Roofline: what the bytes or the products of the work", "take at the ceilings above (the best of each sitting's beginning and end), over the time.", ""]
    for title, texts, nothing in sections(rows, data["header"]["native kernels"]):
        text += [f"## {title}", "", *(f"- {line}" for line in texts or [nothing]), ""]
    for op in dict.fromkeys(row.case.op for row in rows):
        text += [f"## {TITLES[op]}", ""]
        text += [f"![time over this library's]({_relative(plot, folder)})" for plot in drawn if plot.stem == op] + [""]
        text += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        for row in (row for row in rows if row.case.op == op):
            for i, cells in enumerate(lines(row)):
                bold = f"**{cells[0]}**" if cells[0] == row.best else cells[0]
                text.append("| " + " | ".join([where(row.case) if i == 0 else "", bold, *cells[1:]]) + " |")
        text.append("")
    target = folder / "RESULTS.md"
    target.write_text("\n".join(text))
    return [target, *drawn]


def _relative(path, folder):
    return Path(path).resolve().relative_to(folder.resolve()).as_posix()


def plots(data, folder):
    """A picture for each operator: every contender's time over this library's. Returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder, written = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows_of(data) if row.best]
    for op in dict.fromkeys(row.case.op for row in rows):
        some = [row for row in rows if row.case.op == op]
        names = list(dict.fromkeys(name for row in some for name in row.names if not is_ours(name)))
        figure, axes = pyplot.subplots(figsize=(11, 1.6 + 0.27 * len(some)), layout="constrained")
        for number, name in enumerate(names):
            at = [(row.ratio(name, row.best), y) for y, row in enumerate(some) if name in row.names and row.matches(name)]
            if at:
                xs, ys = zip(*at)
                axes.scatter(xs, ys, label="base / dense" if name in ("base", "dense") else name, marker="osD^vP*X<>hd"[number % 12], s=34, zorder=3)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        wide = high / low > 3
        ticks = [t for t in ((0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if wide else (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2)) if low <= t <= high]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.margins(y=0.5 / len(some))
        axes.set_yticks(range(len(some)), [where(row.case) for row in some], fontsize=7)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.4)
        axes.set_xlabel("time ÷ time of lorakernels (right of the line: slower than lorakernels)")
        axes.set_title(f"{TITLES[op]}: {data['header']['timings']}, {data['header']['device']}, {data['header']['revision']}", fontsize=9)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        written.append(folder / f"{op}.png")
        figure.savefig(written[-1], dpi=110)
        pyplot.close(figure)
    return written
