"""`python -m lorakernels tune`: measure what this card does best, and keep it in the user's cache, from where every later run takes it.

Each row of the Triton tables is tried with its neighbours, a field at a time, and the form of the product (fused, or torch's and an
in-place pass) with either. A candidate has to be as accurate as the table's own row. Results may differ in their last bits from an
untuned card's: another tile is another order of sums.
"""

import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from .backends.triton import measured

SHAPES = [(8192, 4096, 4096), (2048, 4096, 4096), (64, 4096, 4096), (1, 4096, 14336), (8192, 4096, 14336), (8192, 14336, 4096)]  # (M, K, N), the most valuable first
RANKS = (16, 64)
GAIN = 0.97  # of the time: less is noise
ERROR = 2  # times the error of the table's own row, at most
STEPS = {"num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4)}


class Trial(NamedTuple):
    """A row of a table: how to ask for it, and a call that runs through it."""

    table: str
    arguments: tuple
    call: object  # () -> tensor
    exact: object  # () -> what it is in float64
    fixed: tuple = ()  # fields that are not free


def clock(device):
    """Seconds of one call, by events on a GPU."""
    if device == "cpu":

        def seconds(call):
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return seconds

    def seconds(call):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e4

    return seconds


def trials(device, M, K, N, R, dtype, adapter):
    """The rows that a layer of this size meets, forward and backward, and many adapters."""
    from .functional import quantize_nf4
    from .backends import triton
    from .backends.reference import tiles_of
    from .multi_ops import route

    half = dtype != torch.float32
    draw = lambda *shape, of=dtype: torch.randn(*shape, device=device).to(of)  # noqa: E731
    x, dy, W, A, B = draw(M, K), draw(M, N), draw(N, K) * K**-0.5, draw(R, K, of=adapter) * K**-0.5, draw(N, R, of=adapter)
    u, y = draw(M, R, of=torch.float32), draw(M, N)
    X, Y, U, G, A64, B64, W64 = (lambda t=t: t.double() for t in (x, y, u, dy, A, B, W))
    yield Trial("lowrank_down", (M, K, R, half), lambda: triton.lowrank_down(x, [A], None, 0.0), lambda: X() @ A64().t())
    yield Trial("add_lowrank", (M, N, R, half), lambda: triton.add_lowrank(y.clone(), u, B, 1.0, None, None, 0.0), lambda: Y() + U() @ B64().t())
    grad = lambda: triton.lowrank_grad(dy, x, u, B, None, 0.0, 1.0, adapter)  # noqa: E731
    yield Trial("lowrank_grad_up", (M, N, R, half), lambda: grad()[2], lambda: G().t() @ U())
    yield Trial("lowrank_grad_down", (M, K, R, half), lambda: grad()[1], lambda: (G() @ B64()).t() @ X())
    hopper = x.is_cuda and torch.cuda.get_device_capability() >= (9, 0)
    product = lambda: X() @ W64().t() + U() @ B64().t()  # noqa: E731
    yield Trial("linear_lowrank", (M, N, K, R, half, hopper, True), lambda: triton.linear_lowrank_fused(x, W, u, B, 1.0, None, None, None, 0.0), product)
    if half and M <= 128:
        packed = quantize_nf4(W)
        fused = lambda: triton.nf4_linear_lowrank_fused(x, *packed[:3], *packed.format, False, u, B, 1.0, None, None, None, 0.0)  # noqa: E731
        yield Trial("nf4_linear_lowrank", (M,), fused, lambda: X() @ packed.dequantize(torch.float32).double().t() + U() @ B64().t(), ("GROUP_M",))
    E = 8
    routed = route(torch.arange(M, device=device) % E, E)
    if routed[2] is None:
        routed = (*routed[:2], tiles_of(routed[1], M))
    stack_A, stack_B = draw(E, R, K, of=adapter) * K**-0.5, draw(E, N, R, of=adapter)
    rows = lambda stack, t, turned: torch.stack([t[i].double() @ (stack[i % E].double() if turned else stack[i % E].double().t()) for i in range(M)])  # noqa: E731
    if M <= 64:
        yield Trial("multi_down", (R, half), lambda: triton.multi_lowrank_down(x, stack_A, *routed, None, None, None, None, 1)[0], lambda: rows(stack_A, x, False)[routed[0]], ("BLOCK_M",))
        sorted_u = u[routed[0]][None]

        def add():
            out = y.clone()
            triton.multi_add_lowrank(out, sorted_u, stack_B, None, *routed, None, None, None, None)
            return out

        yield Trial("multi_add", (half,), add, lambda: Y() + rows(stack_B, u, False), ("BLOCK_M",))


def error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item() if out.isfinite().all() else float("inf")


def neighbours(tile, field):
    """The tile with another value of one field."""
    value = getattr(tile, field)
    for other in STEPS.get(field) or (value // 2, value * 2):
        if other != value and (field in STEPS or 16 <= other <= 256):
            yield tile._replace(**{field: other})


def search(trial, seconds, rounds, deadline, say):
    """(the table's own row, the best found, its time over the own row's); candidates that do not compile or are less exact are passed over."""
    from .backends.triton import tiles

    key = measured.key(trial.table, trial.arguments)
    own = getattr(tiles, trial.table).plain(*trial.arguments)
    exact = trial.exact()

    def attempt(tile):
        measured.rows[key] = tile
        try:
            wrong = error(trial.call(), exact)
            return wrong, statistics.median(seconds(trial.call) for _ in range(rounds))
        except Exception as failed:  # too much shared memory, a spill that the compiler refuses: not a candidate
            say(f"  {trial.table} {tuple(tile)}: {type(failed).__name__}")
            return float("inf"), float("inf")
        finally:
            del measured.rows[key]

    allowed, first = attempt(own)
    best, took = own, first
    for field in own._fields:
        for tile in [] if field in trial.fixed else neighbours(best, field):
            if time.perf_counter() > deadline:
                break
            wrong, its = attempt(tile)
            if wrong <= ERROR * allowed and its < took * GAIN:
                best, took = tile, its
    return own, best, took / first


def _search_all(device, shapes, ranks, dtypes, deadline, rounds, say, found):
    """tune's search, into `found` as it goes; what was found is in measured.rows meanwhile."""
    from .backends import triton

    seconds = clock(device)
    for dtype, adapter in dtypes:
        for M, K, N in shapes:
            for R in ranks:
                for trial in trials(device, M, K, N, R, dtype, adapter):
                    if time.perf_counter() > deadline:
                        say("the budget is spent")
                        return
                    key = measured.key(trial.table, trial.arguments)
                    if key in found:
                        continue
                    own, best, ratio = search(trial, seconds, rounds, deadline, say)
                    say(f"{trial.table}{trial.arguments}: {tuple(best)}" + (f" takes {ratio:.3f} x {tuple(own)}" if best != own else ", the table's own"))
                    if best != own:
                        found[key] = measured.rows[key] = best  # the decisions below meet the tuned product
                if device != "cpu":
                    x, W, u, B = (torch.randn(*size, device=device).to(of) for size, of in (((M, K), dtype), ((N, K), dtype), ((M, R), torch.float32), ((N, R), adapter)))
                    forms = [lambda form=form: form(x, W, u, B, 1.0, None, None, None, 0.0) for form in (triton.linear_lowrank_composed, triton.linear_lowrank_fused)]
                    composed, fused = (statistics.median(seconds(form) for _ in range(rounds)) for form in forms)
                    say(f"product of {M} x {K} -> {N}, r {R}: fused takes {fused / composed:.3f} x the composition")
                    if fused < composed * GAIN:
                        found[measured.key("fuses", (M, N, K, R, dtype, torch.cuda.get_device_capability()))] = True


def tune(device, shapes=None, ranks=RANKS, dtypes=None, budget=300.0, rounds=10, say=print):
    """{key: tile or bool} of rows that beat the table's own, the most valuable shapes first, within `budget` seconds. Nothing is kept."""
    found = {}
    try:
        _search_all(device, shapes or SHAPES, ranks, dtypes or [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], time.perf_counter() + budget, rounds, say, found)
    finally:
        for key in found:
            measured.rows.pop(key, None)
    return found


def save(found, path):
    """Write rows where measured.py looks for them."""
    rows = [[list(key), [row] if row is True else list(row)] for key, row in found.items()]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": measured.versions(), "rows": rows}, indent=1) + "\n")
    return path


def main(arguments):
    """The command of `python -m lorakernels tune`. Exit code 1 where there is nothing to tune."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m lorakernels tune", description=__doc__)
    parser.add_argument("--budget", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--out", metavar="FILE", help="default: the user's cache, where every later run finds it")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU that torch can use: the tables of the CPU kernels are not tuned, and Triton's are for GPUs")
        return 1
    path = asked.out or measured.place(torch.cuda.get_device_name())
    if path is None:
        print("LORAKERNELS_TUNED=off: name a file with --out")
        return 1
    found = tune("cuda", budget=asked.budget)
    print(f"{len(found)} rows beat the tables' own: {save(found, path)}")
    return 0
