"""From pytest's output on stdin, the part that is kept: versions, counts, the error rule, what was skipped and why."""

import platform
import re
import sys
import time

import torch


def main():
    lines = [line.rstrip() for line in sys.stdin if not re.fullmatch(r"[.sFEx]*\s*\[\s*\d+%\]", line.strip())]
    keep = [line for line in lines if re.match(r"(SKIPPED|FAILED|ERROR|error rule|backends? |Triton's|\d+ (passed|failed))", line)]
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    print(f"make test-all, {time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, Triton {triton_version}, GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    print("\n".join(keep))


if __name__ == "__main__":
    main()
