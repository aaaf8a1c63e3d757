"""What the fine-tuning is measured by: ROUGE-L, BLEU, answer perplexity, and perplexity on general text."""

import math

import numpy as np
import torch
from chat import answer_loss, pad_left
from tqdm import tqdm


@torch.no_grad()
def generate(model, tokenizer, prompts, new_tokens, batch, title):
    """Greedy answers, in the order of `prompts` (lists of ids)."""
    device, answers = next(model.parameters()).device, [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in tqdm(range(0, len(order), batch), desc=title, unit="batch"):
        chosen = order[start : start + batch]
        ids, mask = pad_left([prompts[i] for i in chosen], tokenizer.pad_token_id, device)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        for i, text in zip(chosen, tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)):
            answers[i] = text.strip()
    return answers


@torch.no_grad()
def answer_perplexity(model, encoded, pad, batch, title):
    total = count = 0
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
    for start in tqdm(range(0, len(order), batch), desc=title, unit="batch"):
        loss, tokens, _ = answer_loss(model, [encoded[i] for i in order[start : start + batch]], pad)
        total, count = total + loss.item(), count + tokens
    return math.exp(total / count)


@torch.no_grad()
def text_perplexity(model, tokenizer, text, window, windows):
    """Over the first `windows` windows of a text."""
    ids = tokenizer(text[: window * windows * 8], add_special_tokens=False)["input_ids"][: window * windows]
    total = count = 0
    for start in range(0, len(ids) - 1, window):
        piece = torch.tensor([ids[start : start + window]], device=next(model.parameters()).device)
        logits = model(input_ids=piece, use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits.float(), piece[0, 1:], reduction="sum").item()
        count += piece.shape[1] - 1
    return math.exp(total / count)


def rouge_l(answers, references):
    """F-measures, one per pair."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return np.array([scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in zip(answers, references)])


def bleu(answers, references):
    import sacrebleu

    return sacrebleu.corpus_bleu(answers, [references]).score


def bootstrap_interval(gains, draws=10000, seed=0):
    """The 95 % interval of the mean of paired gains."""
    rng = np.random.default_rng(seed)
    means = rng.choice(gains, (draws, len(gains))).mean(1)
    return np.quantile(means, [0.025, 0.975])
