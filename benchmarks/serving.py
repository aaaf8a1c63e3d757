"""The serving systems' kernels for many adapters, from the folder that --peers names: DIR/vllm, DIR/sglang and DIR/punica.

As in the wheels of vLLM 0.33.0 and SGLang 0.5.23, unpacked, and in Punica's repository, built in place. Of the two servers only the
files that hold the kernels run: the packages around them, which need a server's whole installation, are stood in for by empty ones.
None of it is kept here.
"""

import functools
import importlib
import sys
import types
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

CHUNK = 16  # rows of a segment of SGLang's: its server's default


def multi(folder):
    """{name: maker (A (E,R,K), B (E,N,R), ids (M,), scaling) -> (function y, x: y += its low-rank part), or why not}."""
    if not torch.cuda.is_available():
        return dict.fromkeys(MAKERS, "needs a GPU")
    if folder is None:
        return dict.fromkeys(MAKERS, "no folder of peers was named (--peers)")
    return {name: load(name, folder) for name in MAKERS}


@functools.lru_cache(maxsize=None)
def load(name, folder):
    """The maker over the kernels of that folder, or why not."""
    if not (Path(folder) / name.lower()).is_dir():
        return f"there is no {name.lower()} in the folder of --peers"
    if folder not in sys.path:
        sys.path.insert(0, folder)
    before = set(sys.modules)
    try:
        return MAKERS[name](Path(folder))
    except Exception as error:
        for half in set(sys.modules) - before:
            del sys.modules[half]
        return f"{name} does not import: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def _empty_packages(folder, path):
    """Put `path` and the packages above it into sys.modules without running their __init__; one that is there already stays."""
    names = list(accumulate(path.split("."), "{}.{}".format))
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, package)


def _stand_in(name, **found):
    """A module that holds `found` alone, where none of that name was imported before."""
    module = types.ModuleType(name)
    vars(module).update(found)
    sys.modules.setdefault(name, module)


def _unregistered(**operator):
    """vLLM then calls its function itself, which costs the host less."""
    raise AttributeError(operator["op_name"])


def _sorted_rows(ids):
    """(the rows in the order of their adapters, the adapters named, how many rows each has)."""
    return (torch.argsort(ids, stable=True).int(), *torch.unique(ids, return_counts=True))


def vllm(folder):
    _empty_packages(folder, "vllm.lora.ops.triton_ops")
    capability = lambda: 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]  # noqa: E731
    platform = SimpleNamespace(
        is_cuda=lambda: torch.version.cuda is not None, is_device_capability=lambda asked: capability() == asked, has_device_capability=lambda asked: capability() >= asked
    )  # fmt: skip
    _stand_in("vllm.logger", init_logger=lambda name: mock.MagicMock())
    _stand_in("vllm.platforms", current_platform=platform)
    _stand_in("vllm.triton_utils", triton=importlib.import_module("triton"), tl=importlib.import_module("triton.language"))
    _stand_in("vllm.utils.torch_utils", direct_register_custom_op=_unregistered, async_tensor_h2d=torch.tensor)
    shrink = importlib.import_module("vllm.lora.ops.triton_ops.lora_shrink_op").lora_shrink
    expand = importlib.import_module("vllm.lora.ops.triton_ops.lora_expand_op").lora_expand

    def make(A, B, ids, scaling):
        (E, R, _), M, device = A.shape, len(ids), ids.device
        order, active, counts = _sorted_rows(ids)
        named, number = torch.full((E + 1,), -1, dtype=torch.int32, device=device), torch.zeros(E + 1, dtype=torch.int32, device=device)
        begins = torch.zeros(E + 2, dtype=torch.int32, device=device)
        named[: len(active)], number[: len(active)], begins[1 : len(active) + 1] = active.int(), counts.int(), counts.cumsum(0).int()
        routed = (ids.int(), order, number, begins, named, torch.zeros(1, dtype=torch.bool), torch.tensor([len(active)], dtype=torch.int32))
        a, b = [A[:, None].contiguous()], [B[:, None].contiguous()]

        def add(y, x):
            u = torch.empty(1, M, R, dtype=torch.float32, device=device)
            shrink(x, a, u, *routed, scaling)
            expand(u, b, y, *routed, offset_start=0, add_inputs=True)
            return y

        return add

    return make


def sglang(folder):
    """Its default, csgmv: segments of at most CHUNK rows of one adapter. Launched by Triton itself, not by its shortcut around Triton's host
    code: between CUDA graphs the two do not differ."""
    _empty_packages(folder, "sglang.kernels.ops.lora.dense")
    _empty_packages(folder, "sglang.srt.lora")
    _stand_in("sglang.srt.utils", cached_triton_kernel=lambda key=None: lambda kernel: kernel, get_device_name=torch.cuda.get_device_name)
    _stand_in("sglang.srt.lora.utils", LoRABatchInfo=SimpleNamespace)
    shrink = importlib.import_module("sglang.kernels.ops.lora.dense.chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward
    expand = importlib.import_module("sglang.kernels.ops.lora.dense.chunked_sgmv_expand").chunked_sgmv_lora_expand_forward

    def make(A, B, ids, scaling):
        (E, R, _), N, device = A.shape, B.shape[1], ids.device
        order, active, counts = _sorted_rows(ids)
        pieces = [(e, min(CHUNK, n - at)) for e, n in zip(active.tolist(), counts.tolist()) for at in range(0, n, CHUNK)]
        ints = functools.partial(torch.tensor, dtype=torch.int32, device=device)
        batch = SimpleNamespace(
            bs=len(pieces), num_segments=len(pieces), use_cuda_graph=False, max_len=CHUNK, seg_indptr=ints([0, *accumulate(n for _, n in pieces)]),
            weight_indices=ints([e for e, _ in pieces]), lora_ranks=ints([R] * E), permutation=order, scalings=torch.full((E,), scaling, device=device),
        )  # fmt: skip
        ends, ends_cpu = ints([0, N]), torch.tensor([0, N])
        return lambda y, x: expand(shrink(x, A, batch, 1), B, batch, ends, N, y, ends_cpu)

    return make


def punica(folder):
    add_lora = importlib.import_module("punica.ops").add_lora_bgmv

    def make(A, B, ids, scaling):
        a, b = A[:, None].contiguous(), B[:, None].contiguous()  # of one layer

        def add(y, x):
            add_lora(y, x, a, b, ids, 0, scaling)
            return y

        return add

    return make


MAKERS = {"vLLM": vllm, "SGLang": sglang, "Punica": punica}
