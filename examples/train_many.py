"""Train eight adapters of different ranks on eight tasks at once, over one base, and show that none knows of the others.

    python examples/train_many.py                 SmolLM2-135M-Instruct, a sequence of each task in every step
    python examples/train_many.py --check 3       ... then each adapter once more, alone, for 3 steps: the same bits
    python examples/serve_many.py --adapters many_out     what they have learnt, all in one batch

Every adapter has its own optimiser, learning rate and rank. The base runs once over the whole batch. With --check N, each is trained
again from the start for N steps in the same batches with every other sequence on no adapter, and its weights are compared bit
for bit with those after N steps of training at once. Each is saved as a PEFT adapter.
"""

import argparse
import sys
import time
from pathlib import Path

import chat
import finetune
import harvest
import tasks
import torch
from arguments import add_common, parsed
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import lorakernels as lk

RANKS = {"describe": 32, "name": 8, "signature": 16, "arguments": 12, "module": 4, "lines": 3, "shout": 24, "verb": 1}
RATES = {"describe": 1e-3, "name": 2e-3, "signature": 1e-3, "arguments": 2e-3, "module": 3e-3, "lines": 3e-3, "shout": 1e-3, "verb": 5e-3}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--out", default="many_out", help="folder for the adapters, one directory each")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--each", type=int, default=1, help="sequences of every task in a step")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="train each alone for N steps and compare")
    parser.add_argument("--max-tokens", type=int, default=96, help="longer examples are left out")
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser, ("steps", "each", "max_tokens"))
    if not 0 <= options.check <= options.steps:
        parser.error(f"--check: expected 0 to --steps ({options.steps}), got {options.check}")
    return options


def load_batches(tokenizer, options):
    """Of each step: `each` examples of every task, in the tasks' order."""
    pairs, streams = harvest.split(harvest.harvest())[0], []
    for seed, task in enumerate(tasks.TASKS):
        encoded = [chat.encode(tokenizer, row) for row in tasks.rows(task, pairs[seed :: len(tasks.TASKS)])]
        encoded = [example for example in encoded if sum(map(len, example)) <= options.max_tokens]
        if len(encoded) < options.each:
            sys.exit(f"{task}: only {len(encoded)} examples of at most {options.max_tokens} tokens; raise --max-tokens")
        streams.append(chat.batches(encoded, options.each, options.seed + seed, options.steps))
    return [[example for stream in step for example in stream] for step in zip(*streams)]


def fresh_optimisers(adapters):
    return [torch.optim.AdamW(adapter.values(), lr=RATES[task], weight_decay=0.0) for adapter, task in zip(adapters, RANKS)]


def step(model, optimisers, examples, pad, options, only=None):
    """One step of all adapters, or of one with the other sequences on no adapter; the loss of each, per answer token."""
    ids = torch.arange(len(RANKS)).repeat_interleave(options.each)
    if only is not None:
        ids = torch.where(ids == only, ids, -1)
    losses, counts = chat.answer_losses(model, examples, pad, adapter_ids=ids.to(options.device))
    losses, counts = (t.view(len(RANKS), options.each).sum(1) for t in (losses, counts))
    mean = losses / counts  # each adapter's own: what the others do moves nothing
    (mean if only is None else mean[only]).sum().backward()
    for e, optimiser in enumerate(optimisers):
        if only in (None, e):
            optimiser.step()
        optimiser.zero_grad()
    return mean.detach()


def copies(adapter):
    return {name: p.detach().clone() for name, p in adapter.items()}


@torch.no_grad()
def put_back(adapter, values):
    for name, p in adapter.items():
        p.copy_(values[name])


def main():
    options = arguments()
    tokenizer = finetune.load_tokenizer(options)
    pad = tokenizer.pad_token_id
    batches = load_batches(tokenizer, options)
    model = finetune.load_model(options).train()
    torch.manual_seed(options.seed)
    lk.apply_multi_lora(model, len(RANKS), ranks=list(RANKS.values()), lora_alpha=[2 * r for r in RANKS.values()])
    adapters = lk.adapter_parameters(model)
    start, optimisers = [copies(adapter) for adapter in adapters], fresh_optimisers(adapters)
    print(f"{len(RANKS)} adapters of ranks {', '.join(map(str, RANKS.values()))}; {len(RANKS) * options.each} sequences a step; {options.device}, {str(options.dtype)[6:]}")
    first = last = together = None
    tokens, began = 0, time.perf_counter()
    with tqdm(batches, desc="training", unit="step") as bar:
        for number, examples in enumerate(bar, 1):
            losses = step(model, optimisers, examples, pad, options)
            tokens += sum(len(prompt) + len(answer) for prompt, answer in examples)
            first = losses if first is None else first
            last = losses if last is None else 0.8 * last + 0.2 * losses
            bar.set_postfix(loss=f"{losses.mean().item():.3f}")
            if number == options.check:
                together = [copies(adapter) for adapter in adapters]
    print(f"{tokens / (time.perf_counter() - began):.0f} tokens/s")
    for e, task in enumerate(RANKS):
        lk.save_adapter(model, Path(options.out) / task, index=e)
    same = {}
    for e, task in enumerate(RANKS if together else ()):
        for adapter, at_first in zip(adapters, start):
            put_back(adapter, at_first)
        optimisers = fresh_optimisers(adapters)
        for examples in tqdm(batches[: options.check], desc=f"{task} alone", unit="step", leave=False):
            step(model, optimisers, examples, pad, options, only=e)
        same[task] = all(torch.equal(p, together[e][name]) for name, p in adapters[e].items())
    table = Table(title=f"{options.steps} steps of {len(RANKS)} adapters at once")
    for column in ("adapter", "rank", "learning rate", "loss, first step", "loss, last steps") + (("bits as alone",) if same else ()):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for e, (task, rank) in enumerate(RANKS.items()):
        row = [task, str(rank), f"{RATES[task]:g}", f"{first[e].item():.3f}", f"{last[e].item():.3f}"]
        table.add_row(*row, *(["the same" if same[task] else "DIFFERENT"] if same else []))
    Console().print(table)
    print(f"saved to {options.out}/<adapter>")
    if not all(same.values()):
        sys.exit("an adapter trained alone has other weights")


if __name__ == "__main__":
    main()
