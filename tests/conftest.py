"""Set-up: without a GPU Triton runs in its interpreter, which must be asked for before Triton is imported."""

import os

# Threads of torch that wait do so asleep: those of one worker would take another's processor. 177 to 147 s for two files, two workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import numerics
import pytest

from lorakernels import backends

REPAIRED = not GPU and backends.why_not("triton", "cpu", torch.float32) is None and interpreter.repair()


def _devices(name):
    """The device types that a backend is tested on, here."""
    return [d for d in (["cpu", "cuda"] if GPU else ["cpu"]) if backends.why_not(name, d, torch.float32) is None]


USABLE = [(name, device) for name in reversed(backends.NAMES) for device in _devices(name)]


@pytest.fixture(params=USABLE, ids=lambda pair: pair[0] if pair[1] == "cpu" else f"{pair[0]}-{pair[1]}")
def backend(request):
    """The name of a usable backend, which is the one in use during the test; every test that takes it runs over all."""
    name, _ = request.param
    with backends.use_backend(name):
        yield name


@pytest.fixture
def device(request):
    """The device of the `backend` beside it, else the CPU."""
    spec = getattr(request.node, "callspec", None)
    return spec.params["backend"][1] if spec and "backend" in spec.params else "cpu"


@pytest.fixture(autouse=True)
def _same_draws():
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("backend", ("", "cpu"))[1] == "cuda":
            item.add_marker("gpu")
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# -- the summary: how many comparisons ran and which came closest to its bound, over all workers ------------------------

_totals = []


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["numerics"] = [numerics.comparisons, *numerics.worst]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    if "numerics" in getattr(node, "workeroutput", {}):
        _totals.append(node.workeroutput["numerics"])


def pytest_terminal_summary(terminalreporter):
    _totals.append([numerics.comparisons, *numerics.worst])
    ratio, name = max((ratio, name) for _, ratio, name in _totals)
    terminalreporter.write_line(f"error rule: {sum(n for n, _, _ in _totals)} comparisons, worst at {ratio:.3f} of its bound ({name})")
    terminalreporter.write_line("backends run: " + ", ".join(f"{name} on {device}" for name, device in USABLE))
    for name, state in backends.available().items():
        if name not in dict(USABLE):
            terminalreporter.write_line(f"backend {name} not run: {state}")
    if REPAIRED:
        terminalreporter.write_line("Triton's interpreter: bfloat16 casts and products were repaired for these tests")
