"""The benchmark suite: its command, what it shows of a wrong result, and whether `compare` sees what is slower and nothing else."""

import copy
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ["--shapes", "calls", "--op", "lora", "--mode", "fwd+bwd", "--threads", "1", "--seconds", "0.05", "--no-compile", "--dtype", "float32"]


def command(*arguments, **environment):
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "LORAKERNELS_BACKEND")} | environment
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture
def refused(monkeypatch, capsys):
    """The status and the words with which a command line is refused: it runs in this process, for another takes seconds to begin."""

    def run(*arguments):
        from benchmarks import __main__

        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        with pytest.raises(SystemExit) as caught:
            sys.exit(__main__.main())
        said = caught.value.code
        return (said, capsys.readouterr().err) if isinstance(said, int) else (1, said)

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, output) of a small run with everything that it can leave."""
    folder = tmp_path_factory.mktemp("run")
    done = command("run", *TINY, "--json", folder / "a.json", "--csv", folder / "a.csv", "--plot", folder / "plots")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_shows_everyone_and_why_others_are_missing(tiny):
    folder, text = tiny
    assert text.startswith("CPU timings, not GPU results")
    data = json.loads((folder / "a.json").read_text())
    (row,) = data["rows"]
    assert {"base", "lorakernels", "addmm_", "PEFT"} <= set(row["passes"][0]) and len(row["passes"]) == 2
    assert row["judged"]["lorakernels"]["match"] and row["memory"]["lorakernels"]["kept"] > 0 and row["memory"]["lorakernels"]["peak"] > 0
    assert "torch.compile: left out by --no-compile" in text and "Unsloth: " in text and "LoRAFusion: " in text
    lines = (folder / "a.csv").read_text().splitlines()
    assert len(lines) == 1 + len(row["passes"][0]) and lines[0].startswith("op,mode,shapes")
    assert (folder / "plots" / "lora.png").read_bytes()[:4] == b"\x89PNG"


def test_report_and_compare_and_resume(tiny):
    folder, _ = tiny
    done = command("report", folder / "a.json", "--out", folder / "report")
    assert done.returncode == 0, done.stderr
    text = (folder / "report" / "RESULTS.md").read_text()
    assert "CPU timings, not GPU results" in text and "## Rows that lose to someone" in text and "](lora.png)" in text
    done = command("compare", folder / "a.json", folder / "a.json")
    assert done.returncode == 0 and "mean of rows: +0.0 %" in done.stdout


def test_resumed_rows_stay_with_their_sitting(tiny, tmp_path):
    """What was measured is not measured again, and is held against the ceilings of its own time; what did not fit is still said."""
    from benchmarks import report

    _, results, *_ = suite()
    before, file = json.loads((tiny[0] / "a.json").read_text()), tmp_path / "a.json"
    file.write_text(json.dumps(before | {"left_out": ["a row of another day"], "failed": ["another row: an error: of its own"]}))
    done = command("run", *TINY, "--ranks", "16,3", "--json", file, "--resume")
    assert done.returncode == 1, done.stderr  # for what failed
    after = json.loads(file.read_text())
    assert after["left_out"] == ["a row of another day"] and after["failed"] == ["another row: an error: of its own"]
    (kept,) = [row for row in after["rows"] if "sitting" in row]
    assert kept == before["rows"][0] | {"sitting": 0} and len(after["rows"]) == 2
    assert after["earlier"] == [{"header": before["header"], "ceilings": before["ceilings"]}]
    after["earlier"][0]["ceilings"] = {"float32 1": {"copy": 1, "read": 1, "matmul": 1}}
    assert {row.ceiling["copy"] == 1 for row in results.rows_of(after)} == {True, False}
    said = list(report.about(after))
    assert f"{before['header']['date']}, load {before['header']['load']}: 1 rows, with these ceilings" in said and "1 rows did not fit the budget" in said


def test_bad_arguments_are_named(refused):
    status, words = refused("run", "--shapes", "gpt5")
    assert status == 2 and "expected some of design,llama3-8b" in words and "'gpt5'" in words
    status, words = refused("run", "--op", "model", "--shapes", "awkward")
    assert status == 1 and "no row" in words
    done = command("list", "--op", "multi", "--shapes", "qwen2.5-7b", "--tokens", "8")
    assert done.returncode == 0 and "8 x 3584→18944 r16 64 adapters distinct" in done.stdout
    done = command("run", *TINY, "--passes", "1", "--baseline", "addmm,Nobody")
    assert done.returncode == 1 and "--baseline: nobody is called Nobody; there are Liger, " in done.stderr and "addmm_" in done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run", "--tokens", "1,x"], "--tokens: expected a whole number of at least 1, got 'x'"),
        (["run", "--ranks", "0"], "--ranks: expected a whole number of at least 1, got '0'"),
        (["run", "--threads", "-1"], "--threads: expected a whole number of at least 1, got '-1'"),
        (["run", "--passes", "0"], "--passes: expected a whole number of at least 1, got '0'"),
        (["run", "--budget", "-1"], "--budget: expected seconds above 0, got '-1'"),
        (["run", "--seconds", "nan"], "--seconds: expected seconds above 0, got 'nan'"),
        (["run", "--plant", "-0.5"], "--plant: expected a share of at least 0, got '-0.5'"),
        (["run", "--peers", "nowhere"], "--peers: expected a folder, got 'nowhere'"),
        (["run", "--resume"], "--resume: expected --json FILE"),
        (["compare", "nowhere.json", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
        (["compare", __file__, __file__], "test_benchmarks.py: not JSON"),
        (["report", __file__], "test_benchmarks.py: not JSON"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_numbers_and_files_that_are_none_are_named(arguments, words, refused):
    """Before anything is measured, and with another status than a regression's."""
    status, said = refused(*arguments)
    assert status == 2 and words in said


# -- what is wrong, and what is slower ------------------------------------------------------------------------------------------------


def suite():
    from benchmarks import compare, results
    from benchmarks.run import Options, plan, ready

    return compare, results, Options, plan, ready


def test_a_wrong_result_has_no_time():
    from benchmarks import accuracy, report

    compare, results, Options, plan, ready = suite()
    options = Options("cpu", ["lora"], ["calls"], ["fwd+bwd"], dtypes=[("float32", "float32")], threads=[1], compile=False)
    (case,) = plan(options)
    work = ready(case, options)
    ours = next(c for c in work.contenders if c.name == "lorakernels")
    right = ours.call
    ours.call = lambda: {name: t * 1.001 if name == "dB" else t for name, t in right().items()}
    judged = accuracy.judge(work, case.base)
    assert not judged["lorakernels"]["match"] and judged["addmm_"]["match"]
    times = {c.name: [1.0, 1.0] for c in work.contenders}
    data = {"case": vars(case), "flops": 1, "bytes": 1, "passes": [times], "judged": judged, "memory": {}, "skipped": {}}
    row = results.Row(data, {"ceilings": {f"{case.dtype} {case.threads}": {"copy": 1, "read": 1, "matmul": 1}}})
    assert row.best is None
    shown = {cells[0]: cells for cells in report.lines(row)}
    assert "WRONG" in shown["lorakernels"][5] and shown["lorakernels"][1] == "" and shown["addmm_"][1] != ""
    assert any("WRONG" in line for line in report.notes([row], "avx2")[2])


def test_who_raises_is_named_and_this_library_is_not_excused(monkeypatch):
    from benchmarks import accuracy, lora, run

    compare, results, Options, plan, ready = suite()
    options = Options("cpu", ["lora"], ["calls"], ["fwd+bwd"], dtypes=[("float32", "float32")], threads=[1], compile=False, seconds=0.01, passes=1)
    (case,) = plan(options)

    def broken(name):
        def build(case, options):
            work = whole(case, options)

            def fail():
                raise RuntimeError("no such kernel")

            next(c for c in work.contenders if c.name == name).call = fail
            return work

        return build

    whole = lora.build
    theirs = broken("addmm_")
    work = theirs(case, options)
    judged = accuracy.judge(work, case.base)
    assert "addmm_" not in judged and work.skipped["addmm_"] == "raised RuntimeError: no such kernel"
    monkeypatch.setattr(lora, "build", broken("lorakernels"))
    data = run.run(options, lambda *progress: None)
    assert data["rows"] == [] and len(data["failed"]) == 1 and "no such kernel" in data["failed"][0]


def drawn(tiny_row, generator, rows=12, slower=1.0, one=None):
    """A file of rows of two passes, each time with the noise of a shared machine: of a round, of a pass and of a run."""
    made = {"header": {"device": "a"}, "ceilings": {"float32 1": {"copy": 1, "read": 1, "matmul": 1}}, "rows": []}
    for number in range(rows):
        row = copy.deepcopy(tiny_row)
        row["case"] |= {"M": number + 1, "threads": 1}
        row["passes"] = []
        for _ in range(2):
            shift = {name: generator.gauss(0, 0.02) for name in ("base", "lorakernels", "PEFT")}
            times = {name: [] for name in shift}
            for _ in range(8):
                drift = generator.gauss(0, 0.1)  # the machine's own: it meets all
                for name in times:
                    factor = slower if name == "lorakernels" and (one is None or one == number) else 1.0
                    times[name].append(factor * 2.718 ** (drift + shift[name] + abs(generator.gauss(0, 0.03))))
            row["passes"].append(times)
        made["rows"].append(row)
    return made


def test_compare_sees_a_tenth_and_nothing_else(tiny):
    """20 pairs of the same code and 20 with 10 % planted in all rows; 40 % in one row alone, which it names."""
    compare, *_ = suite()
    (row,) = json.loads((tiny[0] / "a.json").read_text())["rows"]
    generator = random.Random(5)
    for _ in range(20):
        first = drawn(row, generator)
        assert compare.compare(first, drawn(row, generator))[0] == []
        assert compare.compare(first, drawn(row, generator, slower=1.1))[0]
        alarms, _, _ = compare.compare(first, drawn(row, generator, slower=1.4, one=3))
        assert len([alarm for alarm in alarms if "mean of" not in alarm]) == 1 and "lora fwd+bwd calls 4 16" in alarms[0]
    wrong = copy.deepcopy(first)
    wrong["rows"][0]["judged"]["lorakernels"]["match"] = False
    assert "was right, is now wrong" in compare.compare(first, wrong)[0][0]
    with pytest.raises(ValueError, match="share no row"):
        compare.compare(first, first | {"rows": []})


def test_who_sits_out_rounds(tiny):
    """Others that are far slower than the base do; this library never, and `compare` takes the rounds that all of a file have."""
    from benchmarks import timing
    from benchmarks.cases import Contender

    compare, *_ = suite()
    slow = lambda: time.sleep(0.03)  # noqa: E731
    found = timing.in_turn([Contender("base", lambda: time.sleep(0.001)), Contender("lorakernels", slow), Contender("PEFT", slow)], "cpu", 0.0, 0.0)
    assert [t is None for t in found["PEFT"]] == [False, False, True] and None not in found["lorakernels"] and None not in found["base"]
    (row,) = json.loads((tiny[0] / "a.json").read_text())["rows"]
    generator = random.Random(5)
    first, slower = drawn(row, generator), drawn(row, generator, slower=1.1)
    for file in (first, slower):
        for one in file["rows"]:
            for times in one["passes"]:
                times["PEFT"][2:] = [None] * 6
                times["lorakernels"][7] = None
    assert compare.compare(first, first)[0] == [] and compare.compare(first, slower)[0]


def test_every_row_of_the_plan_can_be_made_ready():
    """Each operator and mode once, at sizes that cost nothing: contenders agree with float64, or are shown as not doing so."""
    from benchmarks import accuracy

    compare, results, Options, plan, ready = suite()
    options = Options("cpu", ["lora", "nf4", "multi"], ["calls"], threads=[1], compile=False)
    seen = set()
    for case in plan(options):
        if (case.op, case.mode) in seen:
            continue
        seen.add((case.op, case.mode))
        work = ready(case, options)
        judged = accuracy.judge(work, case.base)
        assert judged["lorakernels"]["match"], (case, judged)
        assert work.contenders[0].bare and work.flops >= 0 and work.bytes > 0
    assert len(seen) == 10, seen


def test_marks_are_the_design_s():
    from benchmarks.marks import marks, met

    compare, results, *_ = suite()
    case = {"op": "lora", "mode": "fwd+bwd", "shapes": "design", "M": 512, "K": 2048, "N": 2048, "R": 16, "threads": 1}
    judged = {name: {"error": 1.0, "bound": 0.5, "match": True} for name in ("lorakernels", "PEFT")}
    row = lambda ours, **more: results.Row({"case": case | more, "flops": 1, "bytes": 1, "judged": judged, "passes": [{"base": [1.0], "lorakernels": [ours], "PEFT": [1.2]}]},
                                           {"ceilings": {"float32 1": {"copy": 1, "read": 1, "matmul": 1}}})  # fmt: skip
    (good,), (bad,), (dropped,) = marks(row(1.06), "avx2"), marks(row(1.08), "avx2"), marks(row(1.08, p=0.1), "avx2")
    assert met(good) and not met(bad) and met(dropped) and (round(good[1], 9), good[2]) == (1.06, 1.07)
    assert marks(row(1.0, M=64), "avx2") == []


# -- tuning, the account, the pass -------------------------------------------------------------------------------------------------------


def test_tuned_rows_come_before_the_tables(tmp_path, monkeypatch):
    from lorakernels.backends.triton import measured, tiles

    own = tiles.lowrank_down(64, 4096, 16, True)
    other = own._replace(num_warps=8)
    monkeypatch.setattr(measured, "rows", {})
    path = tmp_path / "tiles.json"
    from lorakernels import tune

    tune.save({measured.key("lowrank_down", (64, 4096, 16, True)): other, measured.key("fuses", (64, 4096, 4096, 16, "torch.bfloat16", (9, 0))): True}, path)
    measured.load(path)
    assert tiles.lowrank_down(60, 4000, 16, True) == other and tiles.lowrank_down(64, 4096, 16, False) != other
    assert tiles.fuses(64, 4096, 4096, 16, "torch.bfloat16", (9, 0)) is True and tiles.fuses(64, 4096, 4096, 16, "torch.bfloat16", (8, 0)) is False
    assert tiles.lowrank_down.plain(64, 4096, 16, True) == own
    for damaged in ("{", '{"versions": {}, "rows": []}', json.dumps({"versions": measured.versions(), "rows": [[["lowrank_down"], [1]]]})):
        path.write_text(damaged)
        with pytest.warns(UserWarning, match="tiles.json"):
            measured.load(path)


SERVERS = {
    "vllm/lora/ops/triton_ops/lora_shrink_op.py": """
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

def rows(sorted_rows, number, begins, named, active):
    for at in range(int(active)):
        if named[at] >= 0:
            yield named[at], sorted_rows[begins[at] : begins[at] + number[at]].long()

def lora_shrink(x, a, u, mapping, sorted_rows, number, begins, named, no_lora, active, scaling):
    assert len(number) == len(named) == len(begins) - 1 and not no_lora.item() and not u.fill_(float("nan")).sum() == 0
    for adapter, some in rows(sorted_rows, number, begins, named, active):
        assert (mapping[some] == adapter).all()
        u[0][some] = x[some] @ a[0][adapter, 0].t() * scaling
""",
    "vllm/lora/ops/triton_ops/lora_expand_op.py": """
from vllm.lora.ops.triton_ops.lora_shrink_op import rows

def lora_expand(u, b, y, mapping, sorted_rows, number, begins, named, no_lora, active, offset_start, add_inputs):
    assert add_inputs and not offset_start
    for adapter, some in rows(sorted_rows, number, begins, named, active):
        y[some] += u[0][some].to(y.dtype) @ b[0][adapter, 0].t()
""",
    "sglang/kernels/ops/lora/dense/chunked_sgmv_shrink.py": """
import torch
from sglang.srt.lora.utils import LoRABatchInfo
from sglang.srt.utils import cached_triton_kernel, get_device_name

def segments(batch):
    for at in range(batch.num_segments):
        some = batch.permutation[batch.seg_indptr[at] : batch.seg_indptr[at + 1]].long()
        assert 0 < len(some) <= batch.max_len
        yield batch.weight_indices[at], some

def chunked_sgmv_lora_shrink_forward(x, a, batch, num_slices):
    u = torch.full((len(x), a.shape[1]), float("nan"), dtype=x.dtype)
    for adapter, some in segments(batch):
        u[some] = x[some] @ a[adapter, : batch.lora_ranks[adapter]].t()
    return u
""",
    "sglang/kernels/ops/lora/dense/chunked_sgmv_expand.py": """
from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import segments

def chunked_sgmv_lora_expand_forward(u, b, batch, ends, size, y, ends_cpu):
    assert ends.tolist() == ends_cpu.tolist() == [0, y.shape[1]] and size == y.shape[1]
    for adapter, some in segments(batch):
        y[some] += batch.scalings[adapter] * u[some] @ b[adapter].t()
    return y
""",
    "punica/__init__.py": "",
    "punica/ops.py": """
def add_lora_bgmv(y, x, a, b, ids, layer, scale):
    for row, adapter in enumerate(ids):
        y[row] += scale * b[adapter, layer] @ (a[adapter, layer] @ x[row])
""",
}


@pytest.mark.parametrize("rows", ["zipf", "identical", "distinct"])
def test_serving_kernels_are_called_as_they_are_described(tmp_path, monkeypatch, rows):
    """Doubles that compute from what they are handed alone, and with no other file of their packages there."""
    import torch

    from benchmarks import lora, multi, serving

    monkeypatch.setattr(sys, "path", list(sys.path))
    for path, text in SERVERS.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    E, M, R, K, N = 5, 40, 3, 12, 8
    draw = lambda *shape: torch.randint(-3, 4, shape).float()  # noqa: E731  whole numbers: every order of adding gives the same
    x, W, A, B, ids = draw(M, K), draw(N, K), draw(E, R, K), draw(E, N, R), multi.adapter_ids(rows, M, E)
    base = torch.nn.functional.linear(x, W)
    for name in serving.MAKERS:
        assert callable(maker := serving.load(name, str(tmp_path))), maker
        assert torch.equal(maker(A, B, ids, lora.SCALING)(base.clone(), x), multi.loop(x, W, A, B, ids)), name
    for module in [name for name in sys.modules if name.split(".")[0] in ("vllm", "sglang", "punica")]:
        del sys.modules[module]
    assert serving.load("vLLM", str(tmp_path / "nowhere")) == "there is no vllm in the folder of --peers"


def test_the_account_knows_every_operator():
    from benchmarks import gpu

    for op, shapes in gpu.SHAPES.items():
        lines = list(gpu.account("h200", op))
        assert lines[0].startswith(f"{op}: ") and "not a measurement" in lines[0]
        assert sum("winner" in line for line in lines) == len(shapes) * (4 if op != "nf4" else 1)
    assert gpu.resident("lowrank_down", gpu.tiles.lowrank_down(8192, 4096, 16, True), gpu.GPUS["h200"], json.loads(gpu.COMPILED.read_text())) >= 1


def test_the_gpu_pass_runs_dry_and_goes_on(tmp_path):
    """The command for the day that a GPU is there, on a CPU: every step, at most 8 files, and nothing done twice."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment |= {"DRY_RUN": "1", "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    run = lambda: subprocess.run(["bash", ROOT / "benchmarks" / "gpu_pass.sh", "600"], capture_output=True, text=True, env=environment)  # noqa: E731
    first = run()
    status = (tmp_path / "out" / "status.txt").read_text()
    assert first.returncode == 0, status + first.stderr
    for step in ("build", "tests", "sanitizer", "tune", "suite"):
        assert f"{step}: 0 in " in status
    assert "CPU timings, not GPU results" in status and len(list((tmp_path / "out").iterdir())) <= 8
    assert "not run: compute-sanitizer" in (tmp_path / "out" / "sanitizer.txt").read_text() or "ran" in (tmp_path / "out" / "sanitizer.txt").read_text()
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    again = run()
    assert again.returncode == 0 and "tune: done before" in again.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == [row | {"sitting": 0} for row in rows]
