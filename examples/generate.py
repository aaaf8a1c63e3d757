"""Generate text with a model in 4 bits, and time it beside the dense model and bitsandbytes.

    python examples/generate.py                                 SmolLM2-135M-Instruct, no adapter
    python examples/generate.py --adapter demo_out/adapter      with the adapter that `make demo` trained
    python examples/generate.py --dtype bfloat16 --prompt "def area(r): return 3.14 * r ** 2"

Every engine decodes greedily from the same prompt; its text and its tokens per second are printed. bitsandbytes (with PEFT) takes
part where it is installed.
"""

import argparse
import time

import chat
import finetune
import harvest
import torch
from arguments import add_common, parsed
from torch import nn

PROMPT = "def area(radius):\n    return math.pi * radius ** 2"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--adapter", default=None, help="a PEFT adapter's directory")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--instruction", default=harvest.INSTRUCTION)
    parser.add_argument("--tokens", type=int, default=48, help="to generate")
    return parsed(parser, ("tokens",))


def linear_layers(model):
    """[(name, module)] of the linear layers but the output head."""
    head = model.get_output_embeddings()
    return [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]


def with_peft(model, options):
    if options.adapter is None:
        return model
    import peft

    return peft.PeftModel.from_pretrained(model, options.adapter).eval()


def dense(options):
    return with_peft(finetune.load_model(options), options)


def nf4(options):
    import lorakernels as lk

    model = finetune.load_model(options)
    for name, linear in linear_layers(model):
        finetune.put(model, name, lk.NF4Linear.from_linear(linear))
    if options.adapter is not None:
        lk.load_adapter(model, options.adapter)
    return model.eval()


def bitsandbytes(options):
    import bitsandbytes as bnb

    model = finetune.load_model(options)
    for name, linear in linear_layers(model):
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=options.dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to(options.device)
        layer.bias = linear.bias
        finetune.put(model, name, layer)
    return with_peft(model.eval(), options)


ENGINES = {"lorakernels NF4": nf4, "bitsandbytes NF4": bitsandbytes, "dense": dense}


@torch.no_grad()
def generate(model, tokenizer, ids, tokens):
    """(text, seconds a token); a short run first, so that nothing is counted that happens once."""
    keywords = dict(do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id, attention_mask=torch.ones_like(ids))
    model.generate(ids, max_new_tokens=2, **keywords)
    began = time.perf_counter()
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **keywords)
    seconds = time.perf_counter() - began
    new = out[0, ids.shape[1] :].tolist()  # all of them are timed; the text ends where the model ended it
    if tokenizer.eos_token_id in new:
        new = new[: new.index(tokenizer.eos_token_id)]
    return tokenizer.decode(new, skip_special_tokens=True), seconds / tokens


def main():
    options = arguments()
    tokenizer = finetune.load_tokenizer(options)
    prompt, _ = chat.encode(tokenizer, {"instruction": options.instruction, "input": options.prompt, "output": ""})
    ids = torch.tensor([prompt], device=options.device)
    print(f"device {options.device}, {str(options.dtype)[6:]}, {torch.get_num_threads()} threads; {ids.shape[1]} tokens in, {options.tokens} out")
    for name, make in ENGINES.items():
        try:
            model = make(options)
        except ImportError as error:
            print(f"\n{name}: left out: {error}")
            continue
        mib = finetune.size_mib(model)
        text, seconds = generate(model, tokenizer, ids, options.tokens)
        print(f"\n{name}: {1 / seconds:.1f} tokens/s, {mib:.0f} MiB of parameters\n  {text.strip()}")
        del model


if __name__ == "__main__":
    main()
