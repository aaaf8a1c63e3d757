"""The CUDA C++ kernels' own bodies, compiled as host C++ and run by fibers (csrc/emulation), under the error rule."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from numerics import check

from lorakernels import dropout
from lorakernels.backends.native import add_lowrank_arguments

ROOT = Path(__file__).parent.parent
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def cuda_headers():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    homes += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    for home in filter(None, homes):
        for folder in ("include", "targets/x86_64-linux/include"):
            if Path(home, folder, "cuda_bf16.h").exists():
                return Path(home, folder)
    return None


def build(edit=lambda text: text):
    """Compile the emulated kernels, after `edit` of each .cu file; kept by the hash of all that went in."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    headers, compiler = cuda_headers(), shutil.which("g++")
    if headers is None or compiler is None or not (ROOT / "csrc").exists():
        pytest.skip("needs the source tree, g++ and the CUDA toolkit's headers")
    sources = {path: edit(path.read_text()) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))}
    headers_text = "".join(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.h")) + sorted((ROOT / "csrc").rglob("*.cuh")))
    key = hashlib.sha256((headers_text + "".join(sources.values()) + sysconfig.get_config_var("EXT_SUFFIX")).encode()).hexdigest()[:16]
    folder = ROOT / ".cache" / f"emulated-{key}"
    module = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for path, text in sources.items():
            files.append(folder / f"{path.stem}-{os.getpid()}.cpp")
            files[-1].write_text(text.replace('#include "', f'#include "{path.parent}/'))
        beside = folder / f"{os.getpid()}.so"
        command = [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-DLK_CUDA_EMULATION"]
        command += [f"-I{folder}" for folder in (headers, pybind11.get_include(), sysconfig.get_paths()["include"])]
        subprocess.run([*command, *files, ROOT / "csrc" / "emulation" / "binding.cpp", "-o", beside], check=True)
        os.replace(beside, module)
    # a name of its own: Python hands out the first module that was loaded under a name again
    spec = importlib.util.spec_from_file_location(f"emulated_{key}._cuda_emulated", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def emulated():
    return build()


def hold(module, M, N, R, dtype, v_dtype, p=0.0, transposed=False, bias=False, order=0, shift=0):
    """One call on a window of a larger matrix; raises AssertionError where a value is wrong or what is around it changed."""
    frame = torch.randn(M + 130, N + 272 + shift).to(dtype)  # room for what a faulty block would write
    around = frame.clone()
    y = frame[1 : M + 1, 8 + shift : 8 + shift + N]
    start = torch.randn(M, N).to(dtype)
    y.copy_(start)
    u, v = torch.randn(M, R), torch.randn(N, R).to(v_dtype)
    v = v.t().contiguous().t() if transposed else v
    b = torch.randn(N).to(v_dtype) if bias else None
    seed = torch.tensor([77]) if p else None
    module.seed(order)
    module.add_lowrank(*add_lowrank_arguments(y, u, v, 0.5, b, seed, p))
    kept = dropout.keep_mask(seed, M, N, p) * dropout.scale(p) if p else torch.ones(M, N)
    added = torch.zeros(N) if b is None else b
    exact = start.double() + 0.5 * (u.double() @ v.double().t()) * kept.double() + added.double()
    eager = (start.float() + 0.5 * (u @ v.float().t()) * kept.float() + added.float()).to(dtype)
    check(f"CUDA emulated {M}x{N} R={R}", y.clone(), exact, eager, base=dtype, K=R)
    around[1 : M + 1, 8 + shift : 8 + shift + N] = y
    assert torch.equal(frame, around), "wrote outside its matrix"


@pytest.mark.parametrize("dtype, v_dtype", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)])
@pytest.mark.parametrize("M, N, R", [(1, 1, 1), (63, 127, 3), (64, 128, 16), (65, 136, 33), (3, 257, 65), (130, 40, 257)])
def test_shapes(emulated, dtype, v_dtype, M, N, R):
    hold(emulated, M, N, R, dtype, v_dtype, bias=True)
    hold(emulated, M, N, R, dtype, v_dtype, transposed=True, shift=1)  # misaligned rows take the narrow path


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout(emulated, dtype, p):
    hold(emulated, 70, 150, 5, dtype, F32, p=p, bias=True)
    hold(emulated, 64, 128, 16, dtype, F32, p=p)


@pytest.mark.parametrize("order", range(4))
def test_any_order_of_warps(emulated, order):
    hold(emulated, 65, 130, 70, BF16, F32, order=order)


BARRIERS = [0, 1]


@pytest.mark.full
@pytest.mark.parametrize("which", BARRIERS)
def test_a_missing_barrier_is_caught(which):
    """Each __syncthreads() left out in turn, in several orders of the warps."""

    def without(text):
        parts = text.split("__syncthreads();")
        assert len(parts) == len(BARRIERS) + 1
        barriers = ["" if i == which else "__syncthreads();" for i in BARRIERS]
        return "".join(part + barrier for part, barrier in zip(parts, [*barriers, ""]))

    broken = build(without)
    for order in range(4):
        with pytest.raises(AssertionError):
            hold(broken, 65, 130, 70, BF16, F32, order=order)


@pytest.mark.full
@pytest.mark.parametrize(
    "good, bad",
    [
        ("r < ranks; ++r", "r < ranks - 1; ++r"),
        ("n0 + c < p.N", "n0 + c < p.N - 1"),
        ("if (m >= p.M || n >= p.N) continue;", "if (n >= p.N) continue;"),
        ("draw.lane(j) >= p.dropout.threshold", "draw.lane(j) > p.dropout.threshold + 40"),
        ("static_cast<uint32_t>(n >> 3)", "static_cast<uint32_t>(n0 >> 3)"),
        ("p.scaling * sum[i][j] + bias[j]", "sum[i][j] + bias[j]"),
        ("(r0 + r) * p.v.col_stride", "r * p.v.col_stride"),
    ],
)
def test_planted_faults_are_caught(good, bad):
    def plant(text):
        assert good in text
        return text.replace(good, bad)

    broken = build(plant)
    with pytest.raises(AssertionError):
        for M, N, R in ((65, 130, 70), (63, 136, 5)):
            hold(broken, M, N, R, BF16, F32, bias=True)
            hold(broken, M, N, R, BF16, F32, p=0.3)
