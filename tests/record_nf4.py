"""Records tests/data/nf4_bitsandbytes.safetensors: what bitsandbytes itself stores and computes. `python tests/record_nf4.py`
where bitsandbytes is installed; the tests read the file, so that they need no bitsandbytes."""

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file

FILE = Path(__file__).parent / "data" / "nf4_bitsandbytes.safetensors"
# name: (N, K, block size, double quantisation, quant_storage, dtype). Values are recorded where blocks don't cross rows: there
# alone bitsandbytes' CPU path has them right.
CASES = {
    "plain": (8, 64, 64, False, torch.uint8, torch.bfloat16),
    "nested": (8, 128, 64, True, torch.uint8, torch.bfloat16),
    "many_blocks": (160, 128, 64, True, torch.uint8, torch.float32),
    "half": (6, 128, 128, True, torch.uint8, torch.float16),
    "small_blocks": (6, 64, 32, False, torch.uint8, torch.float32),
    "large_blocks": (3, 512, 256, True, torch.uint8, torch.bfloat16),
    "crossing": (6, 96, 64, True, torch.uint8, torch.bfloat16),
    "odd": (3, 7, 64, False, torch.uint8, torch.float32),
    "stored_as_bfloat16": (8, 64, 64, True, torch.bfloat16, torch.bfloat16),
    "stored_as_float32": (8, 64, 64, True, torch.float32, torch.bfloat16),
}


def main():
    tensors = {}
    for seed, (name, (N, K, blocksize, nested, storage, dtype)) in enumerate(CASES.items()):
        weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
        if name == "plain":
            weight[2] = 0  # a block of zeros
        packed, state = quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4", quant_storage=storage)
        tensors[f"{name}.source"] = weight
        tensors[f"{name}.weight"] = packed
        tensors |= {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        if K % blocksize == 0:
            tensors[f"{name}.values"] = dequantize_4bit(packed, state)
    save_file({key: value.contiguous() for key, value in tensors.items()}, FILE, metadata={"made_by": f"bitsandbytes {bitsandbytes.__version__}"})


if __name__ == "__main__":
    main()
