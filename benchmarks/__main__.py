"""python -m benchmarks list | run | compare | report | tune | env | model"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch

from . import compare, gpu, machine, report, results, tune
from .cases import DTYPES
from .run import OPERATORS, Options, default_dtypes, plan, run
from .shapes import MODELS, SETS

QUICK_BUDGET = 150  # seconds


def number(kind, holds, what):
    """The type of an argument that is one number."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return read


whole = number(int, lambda value: value >= 1, "a whole number of at least 1")
seconds = number(float, lambda value: 0 < value < float("inf"), "seconds above 0")
share = number(float, lambda value: 0 <= value < float("inf"), "a share of at least 0")


def numbers(text):
    return [whole(part) for part in text.split(",")]


def folder(text):
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}")
    return text


def words(allowed):
    def split(text):
        parts = text.split(",")
        for part in parts:
            if part not in allowed:
                raise argparse.ArgumentTypeError(f"expected some of {','.join(allowed)}, got {part!r}")
        return parts

    return split


def parser():
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="LoRA, NF4 and many adapters, against everyone, in turn, with the errors shown.")
    commands = top.add_subparsers(dest="command", required=True)
    modes = list(dict.fromkeys(mode for module in OPERATORS.values() for mode in module.MODES))
    for name, about in (("list", "the rows that `run` would measure"), ("run", "measure")):
        one = commands.add_parser(name, help=about)
        one.add_argument("--op", type=words(OPERATORS), default=list(OPERATORS), help=",".join(OPERATORS))
        one.add_argument("--mode", type=words(modes), help=",".join(modes))
        one.add_argument("--shapes", type=words(SETS), default=["design"], help=",".join(SETS))
        one.add_argument("--tokens", type=numbers, help="rows of x, as 1,16,256")
        one.add_argument("--ranks", type=numbers)
        one.add_argument("--dtype", type=words(DTYPES), help="of x and the base")
        one.add_argument("--adapter-dtype", type=words(DTYPES), help="default: float32, and bfloat16 too on a GPU")
        one.add_argument("--threads", type=numbers, help="default: all, then 1")
        one.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        one.add_argument("--baseline", type=lambda text: text.split(","), help="names, or parts of them; default: all that can run")
        one.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
        one.add_argument("--no-graphs", action="store_true", help="leave CUDA graphs out")
        one.add_argument("--quick", action="store_true", help=f"the most telling rows, in {QUICK_BUDGET} s")
        one.add_argument("--peers", type=folder, metavar="DIR", help="a folder that holds others' kernels: DIR/vllm, DIR/sglang")
        if name == "run":
            one.add_argument("--budget", type=seconds, metavar="SECONDS", help="stop cleanly within it")
            one.add_argument("--seconds", type=seconds, help="of measuring, a row and pass (2; with --quick 0.5)")
            one.add_argument("--passes", type=whole, default=2, help="times that every row is made anew and measured")
            one.add_argument("--json", metavar="FILE")
            one.add_argument("--resume", action="store_true", help="keep the rows that --json FILE has of this device and revision, and measure the others")
            one.add_argument("--csv", metavar="FILE")
            one.add_argument("--plot", metavar="DIR")
            one.add_argument("--save", action="store_true", help="into benchmarks/results, and render benchmarks/RESULTS.md")
            one.add_argument("--plant", type=share, default=0.0, metavar="SHARE", help="slow this library down by that share, to see `compare` notice")
    one = commands.add_parser("compare", help="exit 1 where b.json is slower than a.json, the noise taken into account")
    one.add_argument("a")
    one.add_argument("b")
    one = commands.add_parser("report", help="Markdown and PNG of a file of results")
    one.add_argument("json", nargs="?", help="default: the newest")
    one.add_argument("--out", metavar="DIR", help="default: benchmarks")
    one = commands.add_parser("tune", help="measure the candidates of the tile tables on this GPU, and print rows for them")
    tune.add_arguments(one)
    commands.add_parser("env", help="what machine this is")
    one = commands.add_parser("model", help="what a GPU should take, from bytes, operations and launches: an account, not a measurement")
    gpu.add_arguments(one)
    return top


def options_of(asked):
    dtypes = None
    if asked.dtype or asked.adapter_dtype:
        bases = asked.dtype or sorted({base for base, _ in default_dtypes(asked.device)})
        dtypes = [(base, adapter) for base in bases for adapter in asked.adapter_dtype or ["float32"] if adapter in (base, "float32")]
        if not dtypes:
            sys.exit(f"--adapter-dtype: expected float32 or the base's, got {','.join(asked.adapter_dtype)} on {','.join(bases)}")
    budget, seconds = getattr(asked, "budget", None), getattr(asked, "seconds", None)
    return Options(
        asked.device, asked.op, asked.shapes, asked.mode, asked.tokens, asked.ranks, dtypes, asked.threads, asked.baseline, asked.quick, not asked.no_compile,
        seconds or (0.5 if asked.quick else 2.0), getattr(asked, "passes", 2), budget or (QUICK_BUDGET if asked.quick else None), asked.peers, not asked.no_graphs,
        getattr(asked, "plant", 0.0),
    )  # fmt: skip


def list_rows(options):
    for case in plan(options):
        print(f"{case.op:6} {case.mode:8} {case.shapes:13} {case.label():45} {case.dtype}+{case.adapter} {case.cache} {case.launch}{f' {case.threads} threads' if case.threads else ''}")
    print(f"models: {', '.join(f'{name} {model.linears()}' for name, model in MODELS.items())}", file=sys.stderr)


@contextlib.contextmanager
def progress_bar():
    """What `run` tells how far it is: a bar with the time left, or lines where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        yield lambda done, of, text, row: print(f"{done}/{of} {text}", file=sys.stderr) if text else None
        return
    columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(20), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("ceilings of this machine", total=None)
        yield lambda done, of, text, row: bar.update(task, completed=done, total=of, description=text or "next")


def earlier(asked):
    """The results that --resume goes on from, or None."""
    if not (asked.resume and Path(asked.json).exists()):
        return None
    before, now = results.load(asked.json), machine.header(asked.device)
    if all(before["header"][key] == now[key] for key in ("device", "revision", "torch")):
        return before
    print(f"{asked.json} is of another device, revision or torch: it is measured anew", file=sys.stderr)


def run_rows(asked, options):
    with progress_bar() as say:
        data = run(options, say, earlier(asked))
    if not data["rows"]:
        print("interrupted before a row was done" if data["interrupted"] else "no row: nothing fits what was asked for, or the budget", file=sys.stderr)
        return 130 if data["interrupted"] else 1
    print(report.text(data))
    if asked.save:
        print("saved:", path := results.save(data, results.place(data["header"])), *report.write(path, path.parent.parent.parent))
    if asked.json:
        results.save(data, asked.json)
    if asked.csv:
        results.write_csv(data, asked.csv)
    if asked.plot:
        print("plots:", *report.plots(data, asked.plot))
    there = {name for row in data["rows"] for name in (*row["judged"], *row["skipped"])}
    nobody = [name for name in options.baselines or () if not any(name.lower() in other.lower() for other in there)]
    if nobody:
        print(f"--baseline: nobody is called {', '.join(nobody)}; there are {', '.join(sorted(there))}", file=sys.stderr)
    return 130 if data["interrupted"] else 1 if data["failed"] or nobody else 0


def main():
    top = parser()
    asked = top.parse_args()
    if asked.command in ("list", "run"):
        if getattr(asked, "resume", False) and not asked.json:
            top.error("--resume: expected --json FILE, whose rows are kept")
        options = options_of(asked)
        return list_rows(options) if asked.command == "list" else run_rows(asked, options)
    if asked.command in ("compare", "report"):
        try:
            if asked.command == "compare":
                return compare.main(asked.a, asked.b)
            print(*report.write(asked.json or results.newest(), asked.out))
        except (OSError, ValueError) as error:  # 1 would be a regression
            top.error(str(error))
    elif asked.command == "env":
        print(json.dumps(machine.header("cuda" if torch.cuda.is_available() else "cpu"), indent=2, ensure_ascii=False))
    elif asked.command == "model":
        gpu.main(asked)
    else:
        return tune.main(asked)


if __name__ == "__main__":
    sys.exit(main())
