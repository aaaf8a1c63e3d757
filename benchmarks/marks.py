"""What the design asks of a row: (what is measured, the figure, its bound, whether more is better)."""

from .results import Row


def marks(row: Row, isa):
    """[(measure, value, bound, higher is better)] of one row; none where the design says nothing."""
    if row.best is None:
        return []
    found = list(_MARKS[row.case.op, row.case.device](row, isa)) if (row.case.op, row.case.device) in _MARKS else []
    return [mark for mark in found if mark[1] is not None]


def met(mark):
    _, value, bound, higher = mark
    return value >= bound if higher else value <= bound


def _lora_cpu(row, isa):
    case = row.case
    if case.mode != "fwd+bwd" or case.R != 16 or (case.K, case.N) not in ((2048, 2048), (576, 1536)) or not 512 <= case.M <= 2048:
        return
    full = case.adapter == "float32"
    bound = (1.20 if full else 1.15) if case.K == 576 else {(True, 0.0): 1.07, (True, 0.1): 1.10, (False, 0.0): 1.05, (False, 0.1): 1.08}[full, case.p]
    yield "time / frozen base", row.ratio(row.best, row.base), bound, False


def _lora_gpu(row, isa):
    case = row.case
    if (case.M, case.K, case.N, case.R, case.dtype, case.adapter) == (8192, 4096, 4096, 16, "bfloat16", "bfloat16"):
        bound = {("fwd", 0.0): 1.06, ("fwd+bwd", 0.0): 1.08, ("fwd+bwd", 0.1): 1.10}.get((case.mode, case.p))
        if bound:
            yield "time / frozen base", row.ratio(row.best, row.base), bound, False


def _nf4_cpu(row, isa):
    case = row.case
    bnb = min((name for name in row.others if name.startswith("bitsandbytes")), key=row.median, default=None)
    if case.mode == "quantize" and case.K == case.N == 4096 and bnb:
        yield "bitsandbytes / time", row.ratio(bnb, row.best), 15, True
    if case.mode == "decode" and (case.K, case.N, case.M) == (4096, 14336, 1) and case.dtype == "bfloat16" and isa in ("avx512bf16", "amx"):
        cold, one = case.cache == "cold", case.threads == 1
        if cold:
            yield "bf16 F.linear / time", row.ratio(row.base, row.best), 7 if one else 6, True
        if bnb and (cold or not one):
            yield "bitsandbytes / time", row.ratio(bnb, row.best), (1.3 if one else 1.25) if cold else 1.8, True
    if case.mode == "decode" and case.M == 16 and bnb:
        yield "bitsandbytes / time", row.ratio(bnb, row.best), 1.2, True
    if case.mode == "fwd" and case.M == 256 and case.dtype == "bfloat16":
        yield "bf16 F.linear / time", row.ratio(row.base, row.best), 0.95, True


def _nf4_gpu(row, isa):
    case = row.case
    if case.mode == "decode" and (case.K, case.N) == (4096, 14336) and case.M <= 16:
        yield "time / plain read of the bytes", row.median(row.best) * row.ceiling["read"] / row.data["bytes"], 1.25, False
    if case.mode in ("decode", "fwd"):
        rivals = [row.ratio(row.best, name) for name in ("bitsandbytes", "dequantize + product") if name in row.others]
        if rivals:
            yield "time / best of dequantise + product, bitsandbytes", max(rivals), 1.05, False
    if case.mode == "fwd+bwd" and case.M >= 4096:
        yield "time / dense LoRA layer", row.ratio(row.best, "lorakernels: dense LoRA"), 1.05, False


def _training(row):
    one = "lorakernels: one adapter"
    if row.case.mode == "fwd+bwd" and row.case.adapters == 8:
        if one in row.names:
            yield "time / one adapter on all rows", row.ratio(row.best, one), 1.10, False
        if "torch._grouped_mm" in row.others:
            yield "torch._grouped_mm / time", row.ratio("torch._grouped_mm", row.best), 1.0, True


def _multi_cpu(row, isa):
    case = row.case
    if (case.mode, case.M, case.K, case.N, case.R, case.adapters, case.rows) == ("decode", 64, 4096, 4096, 16, 64, "distinct"):
        base, best = min(row.times(row.base)), min(row.times(row.best))  # medians' differences are noise on a shared machine
        yield "time / base", row.ratio(row.best, row.base), 1.25, False
        if "PEFT" in row.others and best > base:
            yield "(PEFT - base) / (ours - base), of the best times", (min(row.times("PEFT")) - base) / (best - base), 5, True
    yield from _training(row)


def _multi_gpu(row, isa):
    case = row.case
    if case.mode == "decode" and case.adapters == 64 and case.rows == "distinct":
        size = 2 if case.adapter != "float32" else 4
        floor = (min(case.M, 64) * case.R * (case.K + case.N) * size + 2 * case.M * (case.K + case.N)) / row.ceiling["read"]
        yield "low-rank part / plain read of its bytes", (row.median(row.best) - row.median(row.base)) / floor, 2, False
    yield from _training(row)


_MARKS = {
    ("lora", "cpu"): _lora_cpu, ("lora", "cuda"): _lora_gpu, ("nf4", "cpu"): _nf4_cpu, ("nf4", "cuda"): _nf4_gpu,
    ("multi", "cpu"): _multi_cpu, ("multi", "cuda"): _multi_gpu,
}  # fmt: skip
