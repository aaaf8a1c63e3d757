"""Nothing behind a tensor's end is read or written: tests/guarded.py, in processes that a touch would end."""

import os
import subprocess
import sys
from pathlib import Path

import emulated_cpu
import emulated_cuda
import pytest
from test_house import native_cpu

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX's mprotect")


def run(*arguments, plugin="", **environment):
    script = f"import sys; sys.path.insert(0, {str(TESTS)!r}); {plugin} import guarded; guarded.main(*{arguments!r})"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment)


# avx512bf16 has avx512's code but for its products of bfloat16, amx has both's but for those that tiles take, and what is portable takes a minute
@pytest.mark.parametrize("isa", [pytest.param("portable", marks=pytest.mark.full), "avx2", pytest.param("avx512", marks=pytest.mark.full), pytest.param("avx512bf16", marks=[] if emulated_cpu.tiles_alone() else pytest.mark.full), "amx"])
def test_native_kernels(isa):
    plugin = ""
    if not native_cpu().isas().get(isa):
        if emulated_cpu.why_not():
            pytest.skip(f"{isa} is not on this processor, and has no emulation: {emulated_cpu.why_not()}")
        plugin = "import emulated_cpu; emulated_cpu.install();"
    done = run("cpu", plugin=plugin, LORAKERNELS_BACKEND="cpu", LORAKERNELS_CPU_ISA=isa)
    assert done.returncode == 0 and "nothing behind an end" in done.stdout, (done.returncode, done.stderr[-2000:])


def test_emulated_cuda_kernels():
    done = run("emulated", emulated_cuda.build().__file__)
    assert done.returncode == 0 and "nothing behind an end" in done.stdout, (done.returncode, done.stderr[-2000:])


FAULTS = [
    ("nf4_linear.cu", "n < w.N && k < w.K ?", "n < w.N ?"),
    ("nf4_linear.cu", "n < w.N && k < w.K ?", "k < w.K ?"),
    ("nf4_linear.cu", "m < M && k < K)", "m < M)"),
    ("nf4_linear.cu", "at < count ? w.packed", "at < 16 ? w.packed"),
    ("nf4_linear.cu", "if (row < w.N && column < K) {", "if (column < K) {"),
    ("nf4.cu", "j < RUN && column + j < p.columns", "j < RUN"),
    ("thin.cuh", "m < rows && c + j < cols ?", "m < rows ?"),
    ("thin_half.cuh", "if (m < rows && c < cols) words", "if (c < cols) words"),
    ("thin_half.cuh", "m < rows && c + j < cols)", "m < rows)"),
    ("thin_half.cuh", "if (i < width && 0 < depth) load_vector(at, v[i])", "if (0 < depth) load_vector(at, v[i])"),
    ("thin_half.cuh", "if (0 < width && e < depth) {", "if (0 < width) {"),
    ("thin_half.cuh", "if (i < width && e < depth) v[i][e]", "if (i < width) v[i][e]"),
    ("thin_half.cuh", "row_of(t, i) < left && r + j < u.ranks ?", "row_of(t, i) < left ?"),
    ("thin_half.cuh", "row_of(t, i) < left && r + j < u.ranks ?", "r + j < u.ranks ?"),
    ("add_lowrank_half.cu", "p.bias.data && column < N ?", "p.bias.data ?"),
]


@pytest.mark.full
@pytest.mark.parametrize("name, good, bad", FAULTS)
def test_a_touch_behind_an_end_is_caught(name, good, bad):
    def plant(file, text):
        assert file != name or good in text
        return text.replace(good, bad) if file == name else text

    done = run("emulated", emulated_cuda.build(plant).__file__)
    assert done.returncode < 0, done.stdout
