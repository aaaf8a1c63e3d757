"""The CUDA C++ kernels' own bodies, compiled as host C++ and run by fibers (csrc/emulation), under the error rule."""

import faulthandler
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from numerics import check
from oracle import make_case

from lorakernels import backends, dropout, functional, nf4, ops
from lorakernels.backends import cuda, native, reference, triton
from lorakernels.backends.native import add_lowrank_arguments
from lorakernels.functional import lora_linear

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


def included(path, texts):
    """A file of csrc and all that it includes from there."""
    found, waiting = [], [path]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        waiting += [other for name in re.findall(r'#include "(.*?)"', texts[path]) if (other := Path(os.path.normpath(path.parent / name))) in texts]
    return sorted(found)


def build(edit=lambda file, text: text):
    """Compile the emulated kernels, after `edit` of each file of csrc/cuda; objects and module are kept by the hash of all that went in."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    headers, compiler = cuda_headers(), shutil.which("g++")
    if headers is None or compiler is None or not (ROOT / "csrc").exists():
        pytest.skip("needs the source tree, g++ and the CUDA toolkit's headers")
    csrc, cache = ROOT / "csrc", ROOT / ".cache" / "emulated"
    texts = {path.relative_to(csrc): path.read_text() for folder in (".", "bindings", "cuda", "emulation") for path in sorted((csrc / folder).iterdir()) if path.is_file()}
    texts = {path: edit(path.name, text) if path.parent.name == "cuda" else text for path, text in texts.items()}
    flags = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-DLK_CUDA_EMULATION"]
    flags += [f"-I{folder}" for folder in (headers, pybind11.get_include(), sysconfig.get_paths()["include"])]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    keys = {}  # of each object
    for path in [path for path in texts if path.suffix == ".cu"] + [Path("emulation/binding.cpp")]:
        went_in = [suffix, *flags, *(f"{file}\n{texts[file]}" for file in included(path, texts))]
        keys[path] = hashlib.sha256("\0".join(went_in).encode()).hexdigest()[:16]
    key = hashlib.sha256("".join(keys.values()).encode()).hexdigest()[:16]
    module = cache / key / f"_cuda_emulated{suffix}"
    if not module.exists():
        module.parent.mkdir(parents=True, exist_ok=True)
        work = cache / f"source-{key}-{os.getpid()}"  # csrc with the edited files
        for path, text in texts.items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_text(text)

        def compiled(path):
            made, beside = cache / f"{keys[path]}.o", work / f"{keys[path]}.o"
            if not made.exists():
                subprocess.run([compiler, "-c", *flags, "-x", "c++", work / path, "-o", beside], check=True)
                os.replace(beside, made)
            return made

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, keys))
        subprocess.run([compiler, "-shared", *objects, "-o", work / module.name], check=True)
        os.replace(work / module.name, module)
        shutil.rmtree(work)
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
    module.add_lowrank(0, *add_lowrank_arguments(y, u, v, 0.5, b, seed, p))
    kept = dropout.keep_mask(seed, M, N, p) * dropout.scale(p) if p else torch.ones(M, N)
    added = torch.zeros(N) if b is None else b
    exact = start.double() + 0.5 * ((u.double() @ v.double().t()) * kept.double() + added.double())
    eager = (start.float() + 0.5 * ((u @ v.float().t()) * kept.float() + added.float())).to(dtype)
    check(f"CUDA emulated {M}x{N} R={R}", y.clone(), exact, eager, base=dtype, K=R)
    around[1 : M + 1, 8 + shift : 8 + shift + N] = y
    assert torch.equal(frame, around), "wrote outside its matrix"


@pytest.mark.parametrize("dtype, v_dtype", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)])
@pytest.mark.parametrize("M, N, R", [(1, 1, 1), (63, 127, 3), (64, 128, 16), (65, 136, 33), (3, 257, 65), (130, 40, 257)])
def test_shapes(emulated, dtype, v_dtype, M, N, R):
    hold(emulated, M, N, R, dtype, v_dtype, bias=True)
    hold(emulated, M, N, R, dtype, v_dtype, transposed=True, shift=1)  # misaligned rows take the narrow path


@pytest.mark.parametrize("dtype, v_dtype, R", [(BF16, F32, 12), (F16, F16, 20)])
def test_a_warp_walks_several_tiles(emulated, dtype, v_dtype, R):
    hold(emulated, 4224 + 10, 1024, R, dtype, v_dtype, bias=True)  # two tiles of 16 rows


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout(emulated, dtype, p):
    hold(emulated, 70, 150, 5, dtype, F32, p=p, bias=True)
    hold(emulated, 64, 128, 16, dtype, F32, p=p)


@pytest.mark.parametrize("order", range(4))
def test_any_order_of_warps(emulated, order):
    hold(emulated, 65, 130, 70, BF16, F32, order=order)


# -- the whole backend on the emulation: cuda.py with the launches replaced ------------------------------------------------


def put_on_emulation(module, monkeypatch):
    monkeypatch.setattr(cuda, "module", lambda: module)
    monkeypatch.setattr(cuda, "architecture", lambda tensor: (9, 0))
    monkeypatch.setattr(cuda, "launch", lambda name, tensor, arguments: getattr(module, name)(0, *arguments))
    monkeypatch.setattr(backends, "chosen", lambda *_: cuda)


@pytest.fixture
def on_emulation(emulated, monkeypatch):
    put_on_emulation(emulated, monkeypatch)
    return emulated


def layer_case(M, K, N, R, base, adapter, p=0.0, **layout):
    case = make_case(M, K, N, R, base, adapter, bias=True, lora_bias=True, p=p, **layout)
    if p:
        torch.manual_seed(11)
        case.mask = dropout.keep_mask(dropout.draw_seed("cpu"), M, K, p)
    return case


def hold_layer(case, label=""):
    torch.manual_seed(11)
    results = oracle.run(lora_linear, case)
    oracle.hold(results, case, label=label)
    return results


# one row and rank; below, at and beyond a tile of 32 x 128 x 16; several groups of rows and slabs; nothing a multiple; whole 16 bytes, with
# 24, 64, 65 and an odd number of ranks
@pytest.mark.parametrize("base, adapter", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)])
@pytest.mark.parametrize("M, K, N, R", [(0, 8, 8, 2), (1, 1, 1, 1), (31, 127, 130, 3), (64, 128, 128, 16), (150, 260, 70, 17), (33, 72, 300, 70), (70, 136, 264, 24), (40, 264, 72, 64), (17, 64, 136, 65), (100, 200, 64, 5)])
def test_whole_layer(on_emulation, base, adapter, M, K, N, R):
    hold_layer(layer_case(M, K, N, R, base, adapter))
    if M:
        hold_layer(layer_case(M, K, N, R, base, adapter, p=0.3))


@pytest.mark.parametrize("base", [F32, BF16])
def test_whole_layer_in_any_layout(on_emulation, base):
    M, K, N = 35, 40, 48
    for x in (torch.randn(2 * M, 2 * K)[::2, ::2], torch.randn(K, M).t(), torch.randn(1, K).expand(M, K), torch.randn(M * K + 1)[1:].view(M, K)):
        hold_layer(layer_case(M, K, N, 5, base, F32, x=x.to(base)))
    for dy in (torch.randn(2 * M, 2 * N)[::2, ::2], torch.randn(N, M).t(), torch.randn(1, 1).expand(M, N), torch.randn(M * N + 1)[1:].view(M, N)):
        hold_layer(layer_case(M, K, N, 5, base, F32, dy=dy.to(base)))


@pytest.mark.parametrize("base, adapter", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)])
@pytest.mark.parametrize("R", [6, 40])
def test_whole_layer_with_adapters_of_any_layout(on_emulation, base, adapter, R):
    M, K, N = 35, 72, 136
    generator = torch.Generator().manual_seed(5)
    turned = {"A": torch.randn(K, R, generator=generator).t() * K**-0.5, "B": torch.randn(R, N, generator=generator).t() * R**-0.5}
    sliced = {"A": torch.randn(R, 2 * K, generator=generator)[:, ::2] * K**-0.5, "B": torch.randn(N, R + 3, generator=generator)[:, 1 : R + 1] * R**-0.5}
    for some in (turned, sliced):
        hold_layer(replace(layer_case(M, K, N, R, base, adapter), **{name: t.to(adapter) for name, t in some.items()}))


def hold_sums_that_cancel(base):
    """Few products, of which little may be left: every bit of a float32 adapter counts."""
    for seed in range(40):
        oracle.hold_thin(1, 8, 8, 1, base, F32, seed=seed)


@pytest.mark.parametrize("base", [BF16, F16])
def test_sums_that_cancel(on_emulation, base):
    hold_sums_that_cancel(base)


@pytest.mark.parametrize("base, adapter", [(BF16, F32), (BF16, BF16), (F16, F32)])
@pytest.mark.parametrize("R", [6, 20])
def test_more_rows_share_a_block(on_emulation, base, adapter, R):
    """Beyond 4096 rows, where other forms of the kernels run."""
    oracle.hold_thin(4096 + 40, 72, 136, R, base, adapter)


def window(rows, columns, left=3):
    """A matrix in the middle of NaN: what is read beside it shows. left=8: its rows are 16-byte aligned."""
    frame = torch.full((rows + 2, columns + 16), float("nan"))
    frame[1:-1, left : left + columns] = torch.randn(rows, columns)
    return frame[1:-1, left : left + columns]


def hold_windows(base):
    hold_layer(layer_case(33, 71, 45, 5, base, F32, x=window(33, 71).to(base), dy=window(33, 45).to(base)))
    hold_layer(layer_case(33, 72, 48, 6, base, F32, x=window(33, 72, 8).to(base), dy=window(33, 48, 8).to(base)))


@pytest.mark.parametrize("base", [F32, BF16])
def test_nothing_is_read_beside_the_matrices(on_emulation, base):
    hold_windows(base)


@pytest.mark.parametrize("order", range(4))
def test_whole_layer_in_any_order_of_warps_and_blocks(on_emulation, order):
    case, results = layer_case(70, 200, 140, 20, BF16, F32, p=0.2), []
    for seed in (order, order + 100):
        on_emulation.seed(seed)
        results.append(hold_layer(case))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def hold_many_rows():
    """More than 256 groups of 64 rows: a program adds to its own part of dB from its second group on. dB alone, where no
    sum over warps stands between two groups."""
    for base, R in ((F32, 2), (BF16, 2), (BF16, 3)):
        dy, u = torch.randn(256 * 64 + 70, 8).to(base), torch.randn(256 * 64 + 70, R)
        dB = ops.lowrank_grad(dy, None, u, None, None, 0.0, 1.5, F32)[2]
        check("dB of many rows", dB, 1.5 * dy.double().t() @ u.double(), 1.5 * dy.float().t() @ u, base=base, K=len(dy))


def test_more_rows_than_programs_share_the_parts(on_emulation):
    hold_many_rows()
    hold_layer(layer_case(256 * 64 + 70, 8, 8, 2, BF16, F32))


def hold_nf4(N, K, dtype, blocksize, nested):
    """Bytes and values are the reference's; a window, its surroundings untouched; a whole layer forward and backward."""
    dense = torch.randn(N, K).to(dtype)
    weight = functional.quantize_nf4(dense, blocksize, nested)
    packed, absmax = reference.quantize_nf4(dense, blocksize)
    assert torch.equal(weight.packed, packed) and (nested or torch.equal(weight.absmax, nf4.bytes_of(absmax)))
    pieces = (*weight[:3], *weight.format)
    for n0, k0, rows, columns in ((0, 0, N, K), (N // 3, K // 3, N - N // 3, K - K // 3), (0, K // 8 // 2 * 8, N, K - K // 8 // 2 * 8)):
        frame = torch.full((rows + 2, columns + 48), 7.0).to(dtype)
        out = frame[1 : rows + 1, 16 : 16 + columns]
        cuda.launch("dequantize_nf4", dense, (native.nf4_weight(*pieces), n0, k0, rows, columns, native.matrix(out)))
        assert torch.equal(out, reference.dequantize_nf4(*pieces, n0, k0, rows, columns, dtype))
        out.fill_(7.0)
        assert (frame == 7.0).all(), "wrote outside its window"


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("N, K, blocksize", [(1, 1, 32), (3, 7, 64), (5, 96, 64), (4, 128, 32), (2, 2100, 4096), (3, 1040, 1024)])
def test_nf4(on_emulation, N, K, dtype, blocksize):
    for nested in (True, False):
        hold_nf4(N, K, dtype, blocksize, nested)


def hold_nf4_linear(module, M, N, K, dtype, blocksize, nested, R=0, v_dtype=F32, x=None, order=0):
    """y of few rows, with a bias and, where R, a low-rank term, in a window whose surroundings stay untouched."""
    weight = functional.quantize_nf4((torch.randn(N, K) * K**-0.5).to(dtype), blocksize, nested)
    x = torch.randn(M, K).to(dtype) if x is None else x
    bias, lowrank_bias = torch.randn(N).to(dtype), torch.randn(N).to(v_dtype) if R else None
    u, v = (torch.randn(M, R), torch.randn(N, R).to(v_dtype)) if R else (None, None)
    frame = torch.full((M + 2, N + 19), 7.0).to(dtype)
    y = frame[1 : M + 1, 1 : N + 1]
    module.seed(order)
    lowrank = add_lowrank_arguments(y, u, v, 0.5, lowrank_bias, None, 0.0)
    module.nf4_linear(0, native.nf4_weight(*weight[:3], *weight.format), native.matrix(x), native.vector(bias), *lowrank)
    dense = weight.dequantize(F32)
    exact, eager = x.double() @ dense.double().t() + bias.double(), torch.addmm(bias, x, dense.to(dtype).t())
    if R:
        exact += 0.5 * (u.double() @ v.double().t() + lowrank_bias.double())
        eager = (eager.float() + 0.5 * (u @ v.float().t() + lowrank_bias.float())).to(dtype)
    check(f"NF4 emulated M={M} N={N} K={K}", y.clone(), exact, eager, base=dtype, K=K)
    out = y.clone()
    y.fill_(7.0)
    assert (frame == 7.0).all(), "wrote outside its matrix"
    return x, weight, out


# one and two groups of 8 rows; a K of one segment of 64, of several steps of 128 for each warp and of half a step at the end;
# rows that begin within blocks and within bytes; 1, 2 and 4 tiles to a block
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "M, N, K, blocksizes",
    [(1, 16, 64, (64, 4096)), (8, 40, 192, (64, 128)), (9, 33, 1088, (64, 256)), (16, 70, 2176, (64,)), (3, 17, 7, (32, 64)), (16, 20, 96, (32, 64)), (5, 10, 855, (64,)),
     (4, 37, 128, (32,)), (5, 4100, 64, (64,)), (12, 4100, 128, (64,)), (3, 8450, 64, (64,)), (9, 8450, 64, (64,))],
)  # fmt: skip
def test_nf4_linear(emulated, dtype, M, N, K, blocksizes):
    for blocksize in blocksizes:
        hold_nf4_linear(emulated, M, N, K, dtype, blocksize, True, R=3)
        hold_nf4_linear(emulated, M, N, K, dtype, blocksize, False, R=17 if N < 100 else 0, v_dtype=dtype)


def test_nf4_linear_of_any_layout(emulated):
    M, K = 5, 128
    for x in (torch.randn(2 * M, 2 * K)[::2, ::2], torch.randn(M * K + 1)[1:].view(M, K), torch.randn(K, M).t(), torch.randn(1, K).expand(M, K)):
        hold_nf4_linear(emulated, M, 24, K, BF16, 64, True, R=2, x=x.to(BF16))


@pytest.mark.parametrize("M, dtype", [(17, BF16), (1, F32)])
def test_nf4_linear_is_refused_where_it_has_no_form(emulated, M, dtype):
    with pytest.raises(RuntimeError, match="refused"):
        hold_nf4_linear(emulated, M, 16, 64, dtype, 64, True)


@pytest.mark.parametrize("order", range(4))
def test_nf4_rows_have_bits_of_their_own(on_emulation, order):
    """In any order of warps, and whichever rows are beside them."""
    x, weight, y = hold_nf4_linear(on_emulation, 16, 40, 1280, BF16, 64, True, order=order)
    for m in (0, 7, 8, 15):
        for rows in (x[m : m + 1], x[max(0, m - 3) : m + 1]):
            assert torch.equal(functional.nf4_linear(rows, weight)[-1], functional.nf4_linear(x, weight)[m])


def test_the_backend_takes_the_form_that_the_table_names(on_emulation, monkeypatch):
    seen = []
    monkeypatch.setattr(cuda, "launch", lambda name, tensor, arguments: seen.append(name) or getattr(on_emulation, name)(0, *arguments))
    monkeypatch.setattr(triton, "nf4_linear_lowrank_fused", lambda x, *rest: seen.append("fused") or torch.zeros(x.shape[0], 48))
    weight = functional.quantize_nf4(torch.randn(48, 64).to(BF16))
    u, v = torch.randn(16, 2), torch.randn(48, 2)
    for M, dtype, names in ((16, BF16, ["nf4_linear"]), (17, BF16, ["fused"]), (129, BF16, ["dequantize_nf4", "add_lowrank"]), (4, F32, ["dequantize_nf4", "add_lowrank"])):
        del seen[:]
        cuda.nf4_linear_lowrank(torch.randn(M, 64).to(dtype), *weight[:3], *weight.format, False, u[:1].expand(M, 2).contiguous(), v, 1.0, None, None, None, 0.0)
        assert seen == names


@pytest.mark.parametrize("base", [F32, BF16])
def test_nf4_layer(on_emulation, base, monkeypatch):
    monkeypatch.setattr(cuda, "SLAB", 1)  # 64 columns at a time
    case = make_case(9, 136, 200, 3, base, F32, bias=True)
    weight = functional.quantize_nf4(case.W)
    leaves = {name: t.clone().requires_grad_() for name, t in case.tensors().items() if name != "W"}
    y = lora_linear(leaves["x"], weight, leaves["A"], leaves["B"], case.scaling, leaves["bias"])
    y.backward(case.dy)
    exact, eager = oracle.in_float64(replace(case, W=weight.dequantize(F32))), oracle.peft_eager(replace(case, W=weight.dequantize(base)))
    for name, out in ({"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}).items():
        check(f"NF4 emulated {name}", out, exact[name], eager[name], base=base, K=200)


@pytest.mark.parametrize("base, adapter", [(F32, F32), (BF16, F32), (F16, F16)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_adapters_that_share_x(on_emulation, base, adapter, p):
    oracle.hold_shared(base, adapter, p)


def test_each_result_alone(on_emulation):
    case = make_case(40, 24, 36, 5, BF16, F32)
    u = ops.lowrank_down(case.x, [case.A], None, 0.0)
    du, dA, dB = ops.lowrank_grad(case.dy, case.x, u, case.B, None, 0.0, 1.5, F32)
    for x, u_in, B in ((None, None, case.B), (None, u, None), (case.x, None, case.B), (None, u, case.B)):
        alone = ops.lowrank_grad(case.dy, x, u_in, B, None, 0.0, 1.5, F32)
        for got, whole, wanted in zip(alone, (du, dA, dB), (B is not None, x is not None, u_in is not None)):
            assert torch.equal(got, whole) if wanted else got.numel() == 0


def test_launches(on_emulation):
    """Of our own kernels: 2 forward (and a product of torch's), 4 backward (and a product), with or without dropout."""
    for p in (0.0, 0.2):
        case = make_case(40, 24, 36, 5, BF16, F32, p=p)
        leaves = [t.requires_grad_() for t in (case.x, case.A, case.B)]
        start = on_emulation.launches()
        y = lora_linear(leaves[0], case.W, leaves[1], leaves[2], dropout_p=p)
        assert on_emulation.launches() - start == 2
        y.backward(case.dy)
        assert on_emulation.launches() - start == 2 + 4


# -- planted faults ----------------------------------------------------------------------------------------------------


def hold_everything(module, monkeypatch, order=0):
    """Enough of all kernels that a fault in one of them shows."""
    put_on_emulation(module, monkeypatch)
    hold(module, 65, 130, 70, BF16, F32, order=order, bias=True)
    hold(module, 63, 136, 5, BF16, F32, order=order, p=0.3)
    hold(module, 65, 130, 70, F32, F32, order=order, bias=True)
    hold(module, 63, 136, 5, F32, F32, order=order, p=0.3)
    hold(module, 33, 136, 24, F16, F16, order=order, transposed=True)
    hold_layer(layer_case(70, 200, 144, 40, BF16, F32))
    hold_layer(layer_case(37, 136, 264, 12, BF16, BF16, p=0.3))
    hold_layer(layer_case(150, 130, 70, 17, F16, F32, p=0.3))
    hold_layer(layer_case(150, 130, 70, 17, F32, F32, p=0.3))
    hold_windows(F32)
    hold_windows(BF16)
    hold_sums_that_cancel(BF16)
    hold_sums_that_cancel(F16)
    for arguments in ((9, 20, 1088, BF16, 64, True, 3), (5, 9, 75, F16, 64, True, 2)):
        hold_nf4_linear(module, *arguments, order=order)
    for arguments in ((9, 1024, BF16, 32, True), (3, 1040, F32, 1024, False), (3, 33, F16, 64, True)):
        hold_nf4(*arguments)


def sources():
    return {path.name: path.read_text() for folder in ("cuda",) for path in sorted((ROOT / "csrc" / folder).glob("*.cu*"))}


def assert_caught(run):
    """run() fails with an AssertionError, or a fault's wild access ends its process: a child, so that this one goes on."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's threads are not here
        faulthandler.disable()  # its end by a signal is what is looked for
        try:
            run()
            os._exit(0)
        except AssertionError:
            os._exit(1)
        except BaseException:
            os._exit(2)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 1, f"not caught: exit status {os.waitstatus_to_exitcode(status)}"


BARRIERS = [(name, i) for name, text in sources().items() for i in range(text.count("__syncthreads();"))] if (ROOT / "csrc").exists() else []


@pytest.mark.full
@pytest.mark.parametrize("name, which", BARRIERS)
def test_a_missing_barrier_is_caught(name, which, monkeypatch):
    """Each __syncthreads() left out in turn: some order of the warps shows it."""

    def without(file, text):
        if file != name:
            return text
        parts = text.split("__syncthreads();")
        return "__syncthreads();".join(parts[: which + 1]) + "__syncthreads();".join(parts[which + 1 :])

    broken = build(without)

    def run():
        for order in range(4):
            hold_everything(broken, monkeypatch, order)
        for order in range(4):
            broken.seed(order)
            hold_many_rows()

    assert_caught(run)


FAULTS = [  # a touch behind a tensor's end: test_bounds.py
    ("add_lowrank.cu", "r < ranks; ++r", "r < ranks - 1; ++r"),
    ("add_lowrank.cu", "n0 + c < p.N", "n0 + c < p.N - 1"),
    ("add_lowrank.cu", "if (m >= p.M || n >= p.N) continue;", "if (n >= p.N) continue;"),
    ("add_lowrank.cu", "draw.lane(j) >= p.dropout.threshold", "draw.lane(j) > p.dropout.threshold + 40"),
    ("add_lowrank.cu", "static_cast<uint32_t>(n >> 3)", "static_cast<uint32_t>(n0 >> 3)"),
    ("add_lowrank.cu", "p.scaling * sum[i][j] + bias[j]", "sum[i][j] + bias[j]"),
    ("add_lowrank.cu", "(r0 + r) * p.v.col_stride", "r * p.v.col_stride"),
    ("thin.cuh", "m < rows && c + j < cols ?", "m < rows ?"),
    ("thin.cuh", "m < rows && c + 8 <= cols)", "c + 8 <= cols)"),
    ("thin.cuh", "draw.lane(j) < threshold", "draw.lane(j) <= threshold + 40"),
    ("thin.cuh", "static_cast<uint64_t>(m), static_cast", "static_cast<uint64_t>(m & 7), static_cast"),
    ("thin.cuh", "static_cast<uint32_t>(c >> 3)", "static_cast<uint32_t>(c % 128 >> 3)"),
    ("thin_float.cuh", "int w = 1; w < WARPS", "int w = 2; w < WARPS"),
    ("thin_float.cuh", "row < rows && rank < ranks", "row < rows && rank < ranks - 1"),
    ("lowrank_down.cu", "p.dropout.seed + part.index", "p.dropout.seed + (part.index > 1)"),
    ("lowrank_down.cu", "own.column + part.r0;", "own.column;"),
    ("lowrank_down.cu", "dropout ? p.dropout.scale : 1.0f", "1.0f"),
    ("lowrank_down_half.cu", "p.dropout.seed[part.index]", "p.dropout.seed[part.index > 1]"),
    ("lowrank_down_half.cu", "own.column + part.r0;", "own.column;"),
    ("lowrank_down_half.cu", "dropout ? p.dropout.scale : 1.0f", "1.0f"),
    ("lowrank_down_half.cu", "threadIdx.x / 32 / warps * ROWS", "0"),
    ("thin_half.cuh", "SMALL = ROUNDED ? 1 : 3;", "SMALL = ROUNDED ? 1 : 2;"),
    ("thin_half.cuh", "std::is_same_v<T, __half> ? 2 : 1", "std::is_same_v<T, __half> ? 1 : 1"),
    ("thin_half.cuh", "low -= __int_as_float", "low += __int_as_float"),
    ("thin_half.cuh", "KEPT = A > B ? A : B;", "KEPT = (A > B ? A : B) - 1;"),
    ("thin_half.cuh", "b[both - i])", "b[both - i ? both - i - 1 : 0])"),
    ("add_lowrank_half.cu", "TERMS = O::ROUNDED ? 1 : 2;", "TERMS = 1;"),
    ("thin_half.cuh", "m < rows && c + j < cols)", "m < rows)"),
    ("thin_half.cuh", "draw.lane(2 * i + 1) < threshold", "draw.lane(2 * i) < threshold"),
    ("thin_half.cuh", "static_cast<uint64_t>(m), static_cast", "static_cast<uint64_t>(m & 7), static_cast"),
    ("thin_half.cuh", "static_cast<uint32_t>(c >> 3)", "static_cast<uint32_t>(c % 64 >> 3)"),
    ("thin_half.cuh", "if (i < width && e < depth) v[i][e] = *from;", "if (i < width) v[i][e] = *from;"),
    ("thin_half.cuh", "8 * VEC<GROUPS> * (group / VEC<GROUPS>)", "0"),
    ("thin_half.cuh", "2 * s + i / 2), term)", "2 * s), term)"),
    ("thin_half.cuh", "c ? share[tile][i % 2][1]", "c ? share[tile][i % 2][0]"),
    ("thin_half.cuh", "pair[n][2 * s + 1][l]", "pair[n][2 * s][l]"),
    ("thin_half.cuh", "int w = 1; w < warps", "int w = 2; w < warps"),
    ("thin_half.cuh", "m < M && at % RANKS < ranks", "m < M && at % RANKS < ranks - 1"),
    ("thin_half.cuh", "row_of(t, i) < left && r + j < u.ranks ?", "r + j < u.ranks ?"),
    ("thin_half.cuh", "split<F>(v[i / 2 * 2][i % 2], v[i / 2 * 2 + 1][i % 2], term)", "split<F>(v[i / 2 * 2 + 1][i % 2], v[i / 2 * 2][i % 2], term)"),
    ("thin_half.cuh", "j % 2 ? 0x7632 : 0x5410", "j % 2 ? 0x5410 : 0x7632"),
    ("lowrank_grad_half.cu", "u[TILES * time + tile]", "u[tile]"),
    ("lowrank_grad_half.cu", "place_of(16 * tile + row_of(t, i), g)", "place_of(row_of(t, i), g)"),
    ("lowrank_grad_half.cu", "8 * (2 * t + e) + j, r =", "8 * (2 * t + e) + (j ^ 1), r ="),
    ("lowrank_grad_half.cu", "first ? make_float2(0.0f, 0.0f)", "true ? make_float2(0.0f, 0.0f)"),
    ("lowrank_grad_half.cu", "if (r + 1 < R) at[1]", "if (true) at[1]"),
    ("lowrank_grad_half.cu", "begin + slab_rows < p.M ? begin + slab_rows : p.M", "begin + slab_rows"),
    ("lowrank_grad_half.cu", "R - r0, p.scaling);", "R - r0, 1.0f);"),
    ("lowrank_grad_half.cu", "int w = 1; w < WARPS", "int w = 2; w < WARPS"),
    ("lowrank_grad_half.cu", "2 * g + i / 2", "2 * g + (1 - i / 2)"),
    ("lowrank_grad_half.cu", "k0 + 8 * g);", "8 * g);"),
    ("add_lowrank_half.cu", "if (m >= p.M || n >= N) continue;", "if (n >= N) continue;"),
    ("add_lowrank_half.cu", "draw.lane(j) >= p.dropout.threshold", "draw.lane(j) > p.dropout.threshold + 40"),
    ("add_lowrank_half.cu", "[2 * i + j / 4]", "[2 * i + j % 2]"),
    ("add_lowrank_half.cu", "(p.scaling * delta + added[j])", "(delta + added[j])"),
    ("add_lowrank_half.cu", "left[l][i + 2 * k] = pair[0][k][l]", "left[l][i + 2 * k] = pair[0][0][l]"),
    ("add_lowrank_half.cu", "tile == 0 || R > RANKS", "r0 == 0"),
    ("add_lowrank_half.cu", "static_cast<uint32_t>(n >> 3)", "static_cast<uint32_t>(n0 >> 3)"),
    ("lowrank_grad.cu", "first ? columns[i][j] : *at + columns[i][j]", "columns[i][j]"),
    ("lowrank_grad.cu", "p.R - r0, p.scaling);", "p.R - r0, 1.0f);"),
    ("lowrank_grad.cu", "u + g * TILE_ROWS);", "u);"),
    ("lowrank_grad.cu", "begin + slab_rows < p.M ? begin + slab_rows : p.M", "begin + slab_rows"),
    ("lowrank_grad.cu", "p.dropout.threshold ? p.dropout.scale : 1.0f}", "1.0f}"),
    ("lowrank_grad.cu", "part < s.count", "part < s.count - 1"),
    ("nf4.cu", "(j % 2 ? 0 : 4)", "(j % 2 ? 4 : 0)"),
    ("nf4.cu", "e & 1 ? pair & 15 : pair >> 4", "e & 1 ? pair >> 4 : pair & 15"),
    ("nf4.cuh", "257 + (block >> w.nested_shift)", "257"),
    ("nf4_linear.cu", "32 * (t & 1) + 16 * (t >> 1)", "16 * t"),
    ("nf4_linear.cu", "upper ? own.x : own.z, 2", "upper ? own.x : own.z, 1"),
    ("nf4_linear.cu", "upper ? own.z : got0, words", "upper ? got0 : own.z, words"),
    ("nf4_linear.cu", "8 * (t & 1) + g, column = k0 + SEGMENT * (t >> 1)", "8 * (t >> 1) + g, column = k0 + SEGMENT * (t & 1)"),
    ("nf4_linear.cu", "257 + (block >> w.nested_shift)", "257"),
    ("nf4_linear.cu", "(lane & ~3) | (2 * s + i)", "(lane & ~3) | (2 * s)"),
    ("nf4_linear.cu", "16 * (step16 % 2) + 8 * j", "8 * (step16 % 2) + 16 * j"),
    ("nf4_linear.cu", "step += WARPS) {", "step += WARPS + 1) {"),
    ("nf4_linear.cu", "at < change ? scale[0] : scale[1]", "scale[0]"),
    ("nf4_linear.cu", "(first + at) & 1 ? byte & 15", "at & 1 ? byte & 15"),
    ("nf4_linear.cu", "int from = 1; from < WARPS", "int from = 1; from < WARPS - 1"),
    ("nf4_linear.cu", "if (n >= w.N) continue;", ""),
    ("nf4_linear.cu", "fmaf(low.scaling, added, total)", "total + added"),
    ("nf4_linear.cu", "r < low.R", "r < low.R - 1"),
    ("nf4.cu", "(p.n0 + row) * p.w.K", "row * p.w.K"),
    ("nf4.cu", "j < RUN && column + j < p.columns", "j < RUN"),
    ("nf4.cu", "b < 15; ++b", "b < 14; ++b"),
    ("nf4.cu", "member < half)", "member < half - 1)"),
    ("nf4.cu", "inverse) : -1.0f", "inverse) : 1.0f"),
]


@pytest.mark.full
@pytest.mark.parametrize("name, good, bad", FAULTS)
def test_planted_faults_are_caught(name, good, bad, monkeypatch):
    def plant(file, text):
        assert file != name or good in text
        return text.replace(good, bad) if file == name else text

    broken = build(plant)

    def run():
        hold_everything(broken, monkeypatch)
        if "first ?" in good:  # shows where there are more groups of rows than programs
            hold_many_rows()
        if "warps * ROWS" in good:
            oracle.hold_thin(4096 + 40, 72, 136, 20, BF16, F32)
        oracle.hold_shared(BF16, F32, 0.3)
        oracle.hold_shared(F32, F32, 0.3)

    assert_caught(run)
