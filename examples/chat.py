"""From instruction rows to batches: the model's own chat template, loss on the answer only, left padding."""

import json
import sys

import torch

FIELDS = ("instruction", "input", "output")


def read_jsonl(path):
    """Rows of {"instruction", "input" (optional), "output"}; ends the program naming each malformed line."""
    rows, wrong = [], []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                wrong.append(f"line {number}: not JSON: {error}")
                continue
            if not isinstance(row, dict):
                wrong.append(f"line {number}: expected an object, got a {type(row).__name__}")
                continue
            row.setdefault("input", "")
            bad = [name for name in FIELDS if not isinstance(row.get(name), str) or (name != "input" and not row[name].strip())]
            if bad:
                wrong.append(f"line {number}: expected a text in {', '.join(map(repr, bad))}")
                continue
            rows.append({name: row[name] for name in FIELDS} | {"module": ""})
    if wrong:
        sys.exit(f"{path}: {len(wrong)} malformed rows\n  " + "\n  ".join(wrong[:20]))
    if len(rows) < 2:
        sys.exit(f"{path}: expected at least 2 rows, got {len(rows)}")
    return rows


def encode(tokenizer, row):
    """(prompt ids, answer ids). The prompt ends where the assistant's turn begins."""
    text = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    end = tokenizer.eos_token or ""
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(row["output"] + end, add_special_tokens=False)["input_ids"]
    return prompt_ids, answer_ids


def pad_left(sequences, pad, device):
    """(ids, mask), each (batch, longest): the last tokens of all rows line up, so one slice holds every answer."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad] * (longest - len(s)) + list(s) for s in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def batches(encoded, size, seed, steps):
    """`steps` batches of examples, each epoch shuffled, neighbours in length together so that little is padding."""
    generator = torch.Generator().manual_seed(seed)
    made = 0
    while made < steps:
        order = torch.randperm(len(encoded), generator=generator).tolist()
        pools = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
        groups = []
        for pool in pools:
            pool.sort(key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
            groups += [pool[i : i + size] for i in range(0, len(pool), size)]
        for index in torch.randperm(len(groups), generator=generator).tolist():
            if made < steps:
                made += 1
                yield [encoded[i] for i in groups[index]]


def answer_loss(model, examples, pad):
    """(summed negative log-likelihood of the answers, answer tokens, all tokens)."""
    losses, counts = answer_losses(model, examples, pad)
    return losses.sum(), int(counts.sum()), sum(len(prompt) + len(answer) for prompt, answer in examples)


def answer_losses(model, examples, pad, **keywords):
    """Of each example, the summed negative log-likelihood of its answer, and the answer's tokens; logits only where an answer stands."""
    device = next(model.parameters()).device
    ids, mask = pad_left([prompt + answer for prompt, answer in examples], pad, device)
    longest = max(len(answer) for _, answer in examples)
    labels, _ = pad_left([[-100] * (longest - len(a)) + list(a) for _, a in examples], -100, device)
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=longest + 1, use_cache=False, **keywords).logits[:, -longest - 1 : -1]
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape).sum(1), (labels != -100).sum(1)
