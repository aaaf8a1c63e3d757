"""Decode one batch in which every row uses another adapter, or none.

    python examples/train_many.py                               makes eight adapters
    python examples/serve_many.py --adapters many_out           serves them at once
    python examples/serve_many.py --adapters many_out --tokens 32 --rows 16

Each row's text stands beside that of the same batch with every row on that adapter: the row's logits are the same bits. Against the
adapter run alone, its one row in a batch of its own, the first token that differs is named, if any. Then tokens per second: this
library, PEFT's adapter_names, and one adapter at a time.
"""

import argparse
import json
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

import lorakernels as lk


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--adapters", default="many_out", help="a folder of PEFT adapters, one directory each")
    parser.add_argument("--rows", type=int, default=9, help="of the batch; they go round the adapters and no adapter")
    parser.add_argument("--tokens", type=int, default=24, help="to generate")
    parser.add_argument("--skip-peft", action="store_true")
    options = parsed(parser, ("rows", "tokens"))
    options.found = {path.parent.name: path.parent for path in sorted(Path(options.adapters).glob("*/adapter_config.json"))}
    if not options.found:
        sys.exit(f"--adapters: {options.adapters} holds no directory with an adapter_config.json; examples/train_many.py makes some")
    options.ranks = [max([config["r"], *config.get("rank_pattern", {}).values()]) for config in (json.loads((path / "adapter_config.json").read_text()) for path in options.found.values())]
    return options


def prompts(tokenizer, names):
    """A held-out example of each row's task, or of the description task where the adapter is not one of tasks.py's."""
    _, held_out = harvest.split(harvest.harvest())
    made, short = [], [pair for pair in held_out if len(pair["input"]) < 120]
    for i, name in enumerate(names):
        task = name if name in tasks.TASKS else "describe"
        made.append(chat.encode(tokenizer, tasks.rows(task, [short[(7 * i) % len(short)]])[0])[0])
    return made


@torch.no_grad()
def decode(call, ids, mask, tokens):
    """Greedy: (new tokens (rows, tokens), logits of every step (rows, tokens, vocabulary), seconds)."""
    from transformers import DynamicCache

    cache, made, logits, began = DynamicCache(), [], [], time.perf_counter()
    step = ids
    for _ in range(tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
        out = call(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits.append(out.logits[:, -1])
        step = logits[-1].argmax(-1, keepdim=True)
        made.append(step)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.cat(made, 1), torch.stack(logits, 1), time.perf_counter() - began


def first_difference(one, other):
    """The number of the first token that differs, or None."""
    where = (one != other).nonzero()
    return where[0].item() + 1 if len(where) else None


def peft_model(options):
    import peft

    model = None
    for name, path in options.found.items():
        if model is None:
            model = peft.PeftModel.from_pretrained(finetune.load_model(options), path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    return model.eval()


def main():
    options = arguments()
    tokenizer = finetune.load_tokenizer(options)
    cycle = [*options.found, None]
    names = [cycle[i % len(cycle)] for i in range(options.rows)]
    ids, mask = chat.pad_left(prompts(tokenizer, names), tokenizer.pad_token_id, options.device)

    model = finetune.load_model(options)
    pool = lk.AdapterPool(model, capacity=sum(options.ranks), max_rank=max(options.ranks))
    lk.serve_adapters(model, pool)
    for name, path in options.found.items():
        pool.add(name, path)
    print(f"{len(options.found)} adapters in a pool of {pool.capacity - pool.free_rows()} rank rows; {options.rows} rows, {options.tokens} tokens each; {options.device}, {str(options.dtype)[6:]}")

    def routed(which):
        with pool.route(which):
            return decode(model, ids, mask, options.tokens)

    with pool.route(names):
        decode(model, ids, mask, 1)  # once before, so that nothing is timed that happens once
    made, logits, seconds = routed(names)
    others, alone_seconds, wrong = {}, 0.0, []
    table = Table(title="one batch, an adapter each", show_lines=True)
    for column in ("row", "adapter", "text", "every row on that adapter", "logits", "against the adapter alone"):
        table.add_column(column, overflow="fold")
    for i, name in enumerate(names):
        if name not in others:
            others[name] = routed([name] * options.rows)
        same = torch.equal(others[name][1][i], logits[i])
        wrong += [] if same else [i]
        began = mask[i].argmax().item()
        with pool.route([name]):
            alone, _, took = decode(model, ids[i : i + 1, began:], mask[i : i + 1, began:], options.tokens)
        alone_seconds += took
        differs = first_difference(alone[0], made[i])
        texts = [tokenizer.decode(text[: (text == tokenizer.eos_token_id).nonzero()[:1].sum() or None], skip_special_tokens=True).strip() for text in (made[i], others[name][0][i])]
        table.add_row(str(i), name or "none", texts[0], "the same text" if texts[0] == texts[1] else texts[1], "the same bits" if same else "DIFFERENT", "the same tokens" if differs is None else f"token {differs} differs")
    Console().print(table)

    speeds = {"lorakernels, all rows at once": options.rows * options.tokens / seconds, "lorakernels, one row at a time": options.rows * options.tokens / alone_seconds}
    if not options.skip_peft:
        try:
            rival = peft_model(options)
        except ImportError as error:
            print(f"PEFT: left out: {error}")
        else:
            by_name = [name or "__base__" for name in names]

            def call(**keywords):
                return rival(**keywords, adapter_names=by_name)

            decode(call, ids, mask, 1)
            theirs, their_logits, took = decode(call, ids, mask, options.tokens)
            speeds["PEFT, adapter_names"] = options.rows * options.tokens / took
            agree = sum(first_difference(a, b) is None for a, b in zip(theirs, made))
            print(f"PEFT gives the same tokens in {agree} of {options.rows} rows; first logits differ by {(their_logits[:, 0] - logits[:, 0]).abs().max().item():.2g} at most")
    for name, speed in speeds.items():
        print(f"{name}: {speed:.1f} tokens/s")
    if wrong:
        sys.exit(f"rows {wrong}: their logits depend on their neighbours' adapters")


if __name__ == "__main__":
    main()
