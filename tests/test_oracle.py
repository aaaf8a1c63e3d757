"""The oracle itself: PEFT's real layer, Philox's published answers, the interpreter's repair."""

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from lorakernels import dropout


@pytest.mark.parametrize(
    "base, adapter", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
def test_eager_formula_is_pefts_layer(base, adapter, autocast):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    case = oracle.make_case(5, 32, 24, 4, base, adapter, bias=True, lora_bias=True)
    model = nn.Sequential(nn.Linear(32, 24, dtype=base))
    model[0].weight.data, model[0].bias.data = case.W.clone(), case.bias.clone()
    config = peft.LoraConfig(r=4, lora_alpha=4 * case.scaling, target_modules=["0"], lora_bias=True)
    layer = peft.get_peft_model(model, config, autocast_adapter_dtype=adapter == torch.float32).base_model.model[0]
    layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = case.A.clone(), case.B.clone()
    layer.lora_B.default.bias.data = case.lora_bias.clone()
    x = case.x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = layer(x)
    if autocast is not None:  # PEFT hands back what autocast's addition promoted to; our result has autocast's dtype
        y = y.to(autocast)
    y.backward(case.dy.to(y.dtype))
    ours = oracle.peft_eager(case, autocast)
    assert torch.equal(y, ours["y"])
    assert torch.equal(x.grad, ours["x"])
    assert torch.equal(layer.lora_A.default.weight.grad, ours["A"])
    assert torch.equal(layer.lora_B.default.weight.grad, ours["B"])


@pytest.mark.parametrize(
    "counter, key, words",
    [  # the known answers that Random123 publishes for philox4x32 with 7 rounds
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    assert tuple(oracle.philox(counter, key)) == words


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_keep_mask_is_the_oracles(seed, p):
    assert torch.equal(dropout.keep_mask(torch.tensor([seed]), 3, 21, p), oracle.keep(seed, 3, 21, p))


def test_repaired_interpreter_rounds_and_multiplies_bfloat16():
    pytest.importorskip("triton", reason="triton is not installed")
    import interpreter

    if torch.cuda.is_available():
        pytest.skip("the interpreter is not used where there is a GPU")
    assert not interpreter.broken()
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    values = torch.from_numpy(np.concatenate([bits, [0x7F800000, 0xFF800000, 1, 0x7F7FFFFF]]).astype(np.uint32).view(np.float32))
    ours = torch.from_numpy(interpreter.round_bf16(values.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), values.isnan())
    assert torch.equal(ours[~values.isnan()], values.bfloat16()[~values.isnan()])
