"""Many adapters in one batch on the CPU, one command: python benchmarks/multi_lora.py [--seconds 2]

A decode batch in which each of 64 rows has another adapter, against PEFT's adapter_names, gather + bmm and the base alone; what
more resident adapters cost; and training 8 adapters at once against 8 batches of one. In turn, best of the rounds.
"""

import argparse

import torch
from nf4_linear import best_in_turn
from lora_layer import where
from torch import nn
from torch.nn import functional as F

from lorakernels.functional import lora_linear, multi_lora_linear

try:
    import peft
except ImportError:
    peft = None


def peft_layer(linear, A, B):
    """PEFT's own layer with one adapter for each of the stacks, called with adapter_names."""
    holder = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta"))
    holder[0] = linear
    config = peft.LoraConfig(r=A.shape[1], lora_alpha=A.shape[1], target_modules=["0"])
    model = peft.get_peft_model(holder, config, adapter_name="0")
    for e in range(1, len(A)):
        model.add_adapter(str(e), config)
    layer = model.base_model.model[0].eval()
    with torch.no_grad():
        for e in range(len(A)):
            layer.lora_A[str(e)].weight.copy_(A[e])
            layer.lora_B[str(e)].weight.copy_(B[e])
    return layer


def decode(rows, resident, K, N, R, seconds):
    x, linear = torch.randn(rows, K), nn.Linear(K, N, bias=False)
    A, B = torch.randn(resident, R, K) * K**-0.5, torch.randn(resident, N, R)
    ids = torch.randperm(resident)[:rows]
    W = linear.weight.detach()
    calls = {"base": lambda: F.linear(x, W), "lorakernels": lambda: multi_lora_linear(x, W, A, B, ids, 1.0)}
    at = torch.randperm(resident * R)  # a pool's rank rows, anywhere
    pages, rows_A, rows_B = torch.argsort(at).view(resident, R), A.view(-1, K)[at], B.transpose(1, 2).reshape(-1, N)[at]
    calls["lorakernels, rank rows"] = lambda: multi_lora_linear(x, W, rows_A, rows_B, ids, 1.0, pages=pages)
    assert torch.equal(calls["lorakernels, rank rows"](), calls["lorakernels"]())
    calls["gather + bmm"] = lambda: F.linear(x, W) + torch.bmm(B[ids], torch.bmm(A[ids], x[:, :, None]))[:, :, 0]
    if peft and resident == rows:
        layer, names = peft_layer(linear, A, B), [str(e) for e in ids.tolist()]
        calls["PEFT"] = lambda: layer(x, adapter_names=names)
        assert (layer(x, adapter_names=names) - calls["lorakernels"]()).norm() / F.linear(x, W).norm() < 2**-16
    with torch.no_grad():
        times = best_in_turn(calls, seconds)
    over = times["lorakernels"] - times["base"]
    text = "  ".join(f"{name} {1e3 * t:8.3f} ms" for name, t in times.items())
    more = f"; ours / base {times['lorakernels'] / times['base']:.3f}"
    if "PEFT" in times:
        more += f", (PEFT - base) / (ours - base) {(times['PEFT'] - times['base']) / over:.2f}, of rank rows {(times['PEFT'] - times['base']) / (times['lorakernels, rank rows'] - times['base']):.2f}"
    print(f"decode {rows} rows, {resident} resident, {K}->{N} r={R}: {text}{more}", flush=True)


def training(adapters, tokens, K, N, R, seconds):
    x, dy, W = torch.randn(adapters * tokens, K), torch.randn(adapters * tokens, N), torch.randn(N, K) * K**-0.5
    A, B = (torch.randn(*shape).requires_grad_() for shape in ((adapters, R, K), (adapters, N, R)))
    ids = torch.arange(adapters).repeat(tokens)
    parts = [(x[ids == e].clone(), dy[ids == e].clone()) for e in range(adapters)]

    def at_once():
        leaf = x.requires_grad_()
        leaf.grad = None
        multi_lora_linear(leaf, W, A, B, ids, 1.0).backward(dy)

    def one_by_one():
        for e, (some, gradient) in enumerate(parts):
            leaf = some.requires_grad_()
            leaf.grad = None
            lora_linear(leaf, W, A[e], B[e], 1.0).backward(gradient)

    def one_adapter():
        leaf = x.requires_grad_()
        leaf.grad = None
        lora_linear(leaf, W, A[0], B[0], 1.0).backward(dy)

    times = best_in_turn({"at once": at_once, "one by one": one_by_one, "one adapter, all rows": one_adapter}, seconds)
    print(f"training {adapters} adapters of {tokens} rows, {K}->{N} r={R}: " + "  ".join(f"{name} {1e3 * t:8.2f} ms ({t / times['at once']:.3f}x)" for name, t in times.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each call of a row")
    parser.add_argument("--size", type=int, default=4096, help="K and N")
    options = parser.parse_args()
    print(f"{where('cpu')}, float32, PEFT {peft.__version__ if peft else 'not installed: left out'}")
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        print(f"{threads} thread{'s' * (threads > 1)}")
        for resident in (64, 128, 256):
            decode(64, resident, options.size, options.size, 16, options.seconds)
        training(8, 64, options.size // 2, options.size // 2, 16, options.seconds)


if __name__ == "__main__":
    main()
