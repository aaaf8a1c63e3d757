"""Faults planted in the CUDA C++ kernels, each barrier left out among them, and seen by the tests of their emulation."""

import faulthandler
import os

import oracle
import pytest
import torch
from emulated_cuda import ROOT, build, put_on_emulation
from test_cuda_emulated import (
    BF16, F16, F32, hold, hold_layer, hold_many_rows, hold_nf4, hold_nf4_linear, hold_sums_that_cancel, hold_windows, layer_case,
)  # fmt: skip


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
