"""`python -m benchmarks tune`: the measurement of `python -m lorakernels tune`, printed as rows for backends/triton/tiles.py."""

import os

import torch


def add_arguments(parser):
    parser.add_argument("--budget", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--out", metavar="FILE", help="keep the rows as a file for LORAKERNELS_TUNED, too")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in Triton's interpreter, at sizes that mean nothing: that the command works")


def main(asked):
    if asked.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    from lorakernels import tune
    from lorakernels.backends.triton import measured

    if asked.dry_run:
        float32 = torch.float32
        found = tune.tune("cpu", [(24, 64, 48)], (16,), [(float32, float32)], asked.budget, rounds=1)
        print("a dry run in Triton's interpreter: the rows below mean nothing")
    elif not torch.cuda.is_available():
        print("no GPU that torch can use: `tune --dry-run` shows that the command works")
        return 1
    else:
        found = tune.tune("cuda", budget=asked.budget)
        print(f"# measured on {torch.cuda.get_device_name()}, {measured.versions()}")
    for (table, *sizes), row in found.items():
        print(f"{table}{tuple(sizes)}: {row}")
    if asked.out:
        print("kept:", tune.save(found, asked.out))
    return 0
