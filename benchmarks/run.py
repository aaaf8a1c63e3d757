"""The loop: the rows that tell most first, each made ready, judged, timed in turn and let go, within the budget."""

import gc
import itertools
import time
from dataclasses import asdict, dataclass, field, replace

import torch

from . import accuracy, lora, machine, model, multi, nf4, peers, timing
from .cases import Case, is_ours

OPERATORS = {module.NAME: module for module in (lora, nf4, multi, model)}
REPEATS = 7  # calls of each contender that a row takes at least, looks and warming up included


def default_dtypes(device):
    """Of the base and the adapter."""
    if device == "cuda":
        return [("bfloat16", "bfloat16"), ("bfloat16", "float32")]
    paired = torch.cpu._is_avx512_bf16_supported()  # else a product in bfloat16 takes seconds
    return [("bfloat16", "float32")] * paired + [("float32", "float32")]


@dataclass
class Options:
    """What `run` was asked for; None: what the operator thinks best."""

    device: str
    ops: list
    shapes: list = field(default_factory=lambda: ["design"])
    mode: list = None
    tokens: list = None
    ranks: list = None
    dtypes: list = None
    threads: list = None
    baselines: list = None
    quick: bool = False
    compile: bool = True
    seconds: float = 2.0  # a row and pass
    passes: int = 2
    budget: float = None
    peers: str = None
    graphs: bool = True
    plant: float = 0.0

    def __post_init__(self):
        if self.dtypes is None:
            self.dtypes = default_dtypes(self.device)
        if self.threads is None:
            most = torch.get_num_threads()
            self.threads = [0] if self.device == "cuda" else [most] if self.quick else sorted({1, most}, reverse=True)

    def modes(self, those):
        return [mode for mode in those if self.mode is None or mode in self.mode]

    def without_compile(self):
        """Why torch.compile takes no part, or None."""
        return None if self.compile and not self.quick else "compiling takes longer than --quick allows" if self.quick else "left out by --no-compile"


def plan(options):
    """Every case, the operators' in turn, so that each has its first ones within any budget."""
    lists = [list(OPERATORS[name].cases(options)) for name in options.ops]
    mixed = [case for some in itertools.zip_longest(*lists) for case in some if case is not None]
    cases = [replace(case, threads=threads) for threads in options.threads for case in mixed]
    if options.device == "cuda" and options.graphs:
        cases = [replace(case, launch=launch) for case in cases for launch in (("graph", "eager") if case.op != "model" and case.mode != "bwd" else ("eager",))]
    return list(dict.fromkeys(cases))


def wanted(name, options):
    return options.baselines is None or any(asked.lower() in name.lower() for asked in options.baselines)


def ready(case, options):
    """The case's work, with whom nobody asked for set aside."""
    torch.manual_seed(0)
    work = OPERATORS[case.op].build(case, options)
    for contender in work.contenders[1:]:
        if not is_ours(contender.name) and not wanted(contender.name, options):
            work.skipped[contender.name] = "not among the baselines asked for"
    work.contenders = [c for c in work.contenders if c.name not in work.skipped]
    return work


def as_graphs(work):
    """Every contender as a CUDA graph; what cannot be captured takes no further part."""
    for contender in list(work.contenders):
        try:
            with contender.context():
                contender.call, contender.within = timing.graph(contender), contender.turns
        except accuracy.FAILURES as error:
            work.leave_out(contender, f"not captured: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")


def ceilings_of(options, cases):
    found = {}
    for dtype, threads in dict.fromkeys((case.dtype, case.threads) for case in cases):
        if threads:
            torch.set_num_threads(threads)
        found[f"{dtype} {threads}"] = machine.ceilings(options.device, dtype)
    return found


def one_pass(case, options, rows, deadline):
    """Make the case ready, judge it where that was not done, and time it: {name: [seconds]}. Its row is put into `rows` the first time."""
    work = ready(case, options)
    if case not in rows:
        judged = accuracy.judge(work, case.base)
        memory = {}
        for contender in list(work.contenders):
            try:
                memory[contender.name] = timing.memory(contender, case.device, work.parameters)
            except accuracy.FAILURES as error:
                if contender.bare or is_ours(contender.name):
                    raise
                work.leave_out(contender, f"raised under the profiler: {type(error).__name__}")
        rows[case] = {"case": asdict(case), "flops": work.flops, "bytes": work.bytes, "judged": judged, "memory": memory, "skipped": work.skipped, "passes": []}
    if case.launch == "graph":
        as_graphs(work)
        rows[case]["skipped"] |= work.skipped
    work.contenders = [c for c in work.contenders if c.name not in rows[case]["skipped"]]
    plant = {c.name: options.plant for c in work.contenders if is_ours(c.name) and not c.bare} if options.plant else None
    return timing.in_turn(work.contenders, case.device, options.seconds, deadline, plant)


def run(options, progress, before=None):
    """{"header", "ceilings", "rows", "left_out", "failed"}. progress: called as (done, of, text, row or None) after each step.

    before: such a result, of an earlier run on this machine, whose rows are kept and not measured again, with its header and ceilings
    among "earlier", where their "sitting" says. A KeyboardInterrupt ends it, and what is done is kept: "interrupted" is then true.
    """
    start, threads_before = time.perf_counter(), torch.get_num_threads()
    deadline = start + options.budget if options.budget else float("inf")
    cases = plan(options)
    for name in peers.PACKAGES:
        peers.why_not(name)  # here, and quietly: others import some of them with less manners
    data = {"header": machine.header(options.device), "ceilings": {}, "rows": [], "left_out": [], "failed": [], "interrupted": False}
    rows, speed, known = {}, {}, {}
    if before:
        data["earlier"] = [*before.get("earlier", ()), {key: before[key] for key in ("header", "ceilings")}]
        known = {Case(**row["case"]): {"sitting": len(data["earlier"]) - 1} | row for row in before["rows"]}
        rows = dict(known)
    try:
        data["ceilings"] = ceilings_of(options, cases)
        todo = [(number, case) for number in range(options.passes) for case in cases if case not in known or len(known[case]["passes"]) <= number]
        for done, (number, case) in enumerate(todo):
            progress(done, len(todo), f"{case.op} {case.mode} {case.label()}", None)
            if number and case not in rows:
                continue
            expected = speed.get(case) or estimate(case, data["ceilings"], options)
            if time.perf_counter() + expected > deadline:
                if not number:
                    data["left_out"].append(case.key())
                continue
            began = time.perf_counter()
            if case.threads:
                torch.set_num_threads(case.threads)
            try:
                times = one_pass(case, options, rows, deadline)
            except accuracy.FAILURES as error:  # of this library or of its base: the other rows are worth having all the same
                data["failed"].append(f"{case.key()}: {type(error).__name__}: {error}")
                continue
            rows[case]["passes"].append({name: [t if t is None else float(f"{t:.5g}") for t in some] for name, some in times.items()})
            gc.collect()
            speed[case] = time.perf_counter() - began
            progress(done + 1, len(todo), "", rows[case])
        for key, last in ceilings_of(options, cases).items():  # a shared machine is not as fast all the time
            data["ceilings"][key] = {name: max(value, data["ceilings"][key][name]) for name, value in last.items()}
    except KeyboardInterrupt:
        data["interrupted"] = True
    finally:
        torch.set_num_threads(threads_before)
    data["rows"] = [row for row in rows.values() if row["passes"]]
    if before:  # what was not asked for again, and has no row yet
        settled = {case.key() for case in cases} | {Case(**row["case"]).key() for row in data["rows"]}
        for what in ("left_out", "failed"):
            data[what] += [text for text in before[what] if text.partition(": ")[0] not in settled]
    data["header"]["seconds"] = round(time.perf_counter() - start)
    return data


def estimate(case, ceilings, options):
    """Seconds that a row takes at least: so many calls of some contenders at the machine's rate, and its weights drawn."""
    rate = ceilings[f"{case.dtype} {case.threads}"]
    products = {"fwd+bwd": 2}.get(case.mode, 1)
    weights = model.weights(case) if case.op == model.NAME else case.K * case.N
    one = max(2 * products * case.M * weights / rate["matmul"], 4 * products * weights / rate["read"])
    return REPEATS * 6 * one + weights / 5e7 + min(options.seconds, 1.0)
