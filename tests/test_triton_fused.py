"""Triton's fused product (base and low-rank term in one accumulator), which no table chooses yet, under the error rule."""

import oracle
import pytest
import torch
from oracle import make_case
from test_lora_linear import BF16, F32, MIX_IDS, MIXES, with_mask

from lorakernels import backends
from lorakernels.functional import lora_linear

pytest.importorskip("triton", reason="triton is not installed")

from lorakernels.backends import triton as ours  # noqa: E402
from lorakernels.backends.triton import tiles  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def fused(request, monkeypatch):
    """The triton backend with the fused product wherever linear_lowrank is called; the calls that it saw."""
    if request.param and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need sm_90")
    seen = []

    def linear_lowrank(x, w, *rest):
        seen.append(ours.descriptors(x, w, tiles.linear_lowrank(*x.shape, w.shape[0], 16, True, True, True)) is not None)
        return ours.linear_lowrank_fused(x, w, *rest, use_descriptors=request.param)

    monkeypatch.setattr(ours, "linear_lowrank", linear_lowrank)
    with backends.use_backend("triton"):
        yield seen


# one row; beyond a tile of 128 x 128 on both sides; more row tiles than a group; sizes that descriptors do not take. The order of tiles does not
# meet the dtype: of many tiles `make test` has one mix
@pytest.mark.parametrize(
    "base, adapter, M, K, N, R",
    [
        pytest.param(*mix, *sizes, id=f"{name}-{'-'.join(map(str, sizes))}", marks=[pytest.mark.full] if sizes[0] == 1100 and mix != (BF16, F32) else [])
        for mix, name in zip(MIXES, MIX_IDS)
        for sizes in ((1, 8, 8, 1), (0, 8, 8, 2), (33, 96, 72, 3), (131, 72, 136, 20), (1100, 16, 200, 2), (17, 65, 127, 8))
    ],
)
def test_layer(fused, base, adapter, M, K, N, R):
    case = make_case(M, K, N, R, base, adapter, bias=True, lora_bias=True, device=DEVICE)
    oracle.hold(oracle.run(lora_linear, case), case)
    if M:
        case = with_mask(make_case(M, K, N, R, base, adapter, p=0.3, device=DEVICE))
        oracle.hold(oracle.run(lora_linear, case), case)


def test_descriptors_are_used_where_they_can_be(fused):
    """Forward (W as it lies) and dx (its transpose) both; not for sizes whose rows are not 16-byte aligned."""
    for K, aligned in ((64, True), (65, False)):
        case = make_case(8, K, 32, 4, F32, F32, device=DEVICE)
        del fused[:]
        oracle.run(lora_linear, case)
        assert fused == [aligned, aligned]


@pytest.mark.parametrize("layout", ["transposed", "expanded", "misaligned", "sliced"])
def test_layouts(fused, layout):
    M, K = 20, 40
    x = {
        "transposed": lambda: torch.randn(K, M).t(), "expanded": lambda: torch.randn(1, K).expand(M, K),
        "misaligned": lambda: torch.randn(M * K + 1)[1:].view(M, K), "sliced": lambda: torch.randn(2 * M, 2 * K)[::2, ::2],
    }[layout]().to(DEVICE)  # fmt: skip
    case = make_case(M, K, 24, 4, F32, F32, x=x, device=DEVICE)
    oracle.hold(oracle.run(lora_linear, case), case)


def test_the_composition_runs_where_nothing_was_measured(monkeypatch):
    ran = []
    monkeypatch.setattr(ours, "linear_lowrank_fused", lambda *a: ran.append("fused"))
    monkeypatch.setattr(ours, "linear_lowrank_composed", lambda *a: ran.append("composed"))
    x, w, u, v = torch.randn(4, 8), torch.randn(6, 8), torch.randn(4, 2), torch.randn(6, 2)
    ours.linear_lowrank(x, w, u, v, 1.0, None, None, None, 0.0)
    monkeypatch.setitem(tiles.FUSED, None, lambda M, N, K, R, dtype: True)
    ours.linear_lowrank(x, w, u, v, 1.0, None, None, None, 0.0)
    assert ran == ["composed", "fused"]
