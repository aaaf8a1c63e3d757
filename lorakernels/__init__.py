"""lorakernels: fast, exact low-rank adapters for PyTorch. `python -m lorakernels` tells what this machine can run."""

__version__ = "0.1.0"

from . import backends, functional
from .backends import use_backend
from .checkpoint import load_adapter, save_adapter
from .explain import explain
from .models import apply_lora, disable_adapters, merge_adapters, print_trainable_parameters
from .modules import LoraLinear

__all__ = [
    "LoraLinear",
    "apply_lora",
    "backends",
    "disable_adapters",
    "explain",
    "functional",
    "load_adapter",
    "merge_adapters",
    "print_trainable_parameters",
    "save_adapter",
    "use_backend",
]
