"""lorakernels: fast, exact low-rank adapters for PyTorch. `python -m lorakernels` tells what this machine can run."""

__version__ = "0.1.0"

from . import backends, functional
from .adapter_ids import check
from .backends import use_backend
from .checkpoint import load_adapter, save_adapter
from .explain import explain
from .functional import quantize_nf4
from .models import apply_lora, disable_adapters, merge_adapters, print_trainable_parameters
from .modules import LoraLinear
from .multi_models import adapter_parameters, apply_multi_lora
from .multi_modules import MultiLoraLinear
from .nf4 import NF4Tensor
from .nf4_modules import NF4Linear, QLoraLinear
from .pool import AdapterPool
from .serving import serve_adapters

__all__ = [
    "AdapterPool",
    "LoraLinear",
    "MultiLoraLinear",
    "NF4Linear",
    "NF4Tensor",
    "QLoraLinear",
    "adapter_parameters",
    "apply_lora",
    "apply_multi_lora",
    "backends",
    "check",
    "disable_adapters",
    "explain",
    "functional",
    "load_adapter",
    "merge_adapters",
    "print_trainable_parameters",
    "quantize_nf4",
    "save_adapter",
    "serve_adapters",
    "use_backend",
]
