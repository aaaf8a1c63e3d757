"""How the house stands: imports run one way, backends share one contract, importing does nothing, wide code stays apart."""

import ast
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated_cpu
import pytest
import torch

import lorakernels as lk
from lorakernels import backends, dropout, multi_ops, ops

PACKAGE = Path(lk.__file__).parent
ROOT = PACKAGE.parent

# models -> modules -> functional -> ops -> backends -> kernels; a file may import from lower ranks only
RANK = {
    "__main__": 9, "__init__": 8, "explain": 7, "tune": 7.2, "pool": 7.5, "serving": 7.6, "routes": 4.5, "multi_models": 6.5, "checkpoint": 7, "models": 6, "nf4_modules": 5.5, "multi_modules": 5.6, "pool_modules": 5.6, "modules": 5, "functional": 4, "multi_ops": 3.5, "ops": 3,
    "backends": 2, "backends.cpu": 1.5, "backends.cuda": 1.6, "backends.triton": 1.5, "backends.nf4_path": 1.2, "backends.native": 1.2, "backends.reference": 1.2, "backends.composed": 1.3,
    "backends.triton.kernels": 1.1, "backends.triton.matmul": 1.1, "backends.triton.nf4": 1.1, "backends.triton.nf4_matmul": 1.15, "backends.triton.multi": 1.1, "backends.triton.language": 1.05, "backends.triton.tiles": 1.3, "backends.triton.measured": 1.25, "adapter_ids": 0, "checks": -1, "pages": 0, "flops": 0, "sharding": 0, "nf4": 0, "dropout": 0, "targets": 0, "streams": 0,
}  # fmt: skip


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else ".".join(parts)


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports(name, path):
    """The package's own modules that a file imports."""
    package = name if path.name == "__init__.py" and name != "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] in ("tests", "benchmarks", "examples") for alias in node.names)
            continue
        base = package.split(".") if package else []
        base = base[: len(base) - node.level + 1]
        target = ".".join(base + ([node.module] if node.module else []))
        for alias in node.names:
            full = f"{target}.{alias.name}".strip(".")
            yield full if full in FILES else (target or "__init__")


def test_every_file_has_its_rank():
    assert FILES.keys() == RANK.keys()


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way_down(name):
    for target in imports(name, FILES[name]):
        if target == "__init__" and name == "__main__":
            continue
        assert RANK[target] < RANK[name], f"{name} imports {target}"


@pytest.mark.parametrize("name", backends.NAMES)
@pytest.mark.parametrize("primitive", backends.PRIMITIVES)
def test_backends_have_the_references_signatures(name, primitive):
    function = getattr(backends.load(name), primitive)
    assert inspect.signature(function) == inspect.signature(getattr(backends.load("reference"), primitive))
    assert function.__doc__
    schema = getattr(torch.ops.lorakernels, primitive).default._schema
    assert list(inspect.signature(getattr(multi_ops if primitive.startswith("multi_") else ops, primitive)).parameters) == list(inspect.signature(function).parameters)
    assert [argument.name for argument in schema.arguments] == list(inspect.signature(function).parameters)


def test_importing_does_nothing():
    """No Triton import, no random draw, no environment write, no device query, no new thread."""
    script = """
import os, sys, threading, torch
state, environment, threads = torch.get_rng_state(), dict(os.environ), threading.active_count()
torch.cuda.init = torch.cuda._lazy_init = lambda *a: (_ for _ in ()).throw(AssertionError("device query"))
import lorakernels
assert torch.equal(state, torch.get_rng_state()) and environment == dict(os.environ) and threads == threading.active_count()
for name in ("triton", "safetensors", "transformers", "peft", "lorakernels._cuda", "lorakernels._cpu"):
    assert name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


def test_missing_libraries_are_explained_at_the_first_use():
    script = """
import sys
for name in ("triton", "safetensors", "lorakernels._cpu", "lorakernels._cuda"):
    sys.modules[name] = None
import torch, lorakernels as lk, warnings
layer = lk.LoraLinear(4, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer(torch.randn(2, 4)); layer(torch.randn(2, 4))
assert len(caught) == 1 and "through 'reference' (cpu: lorakernels._cpu is not" in str(caught[0].message), [str(c.message) for c in caught]
for name in ("triton", "cpu", "cuda"):
    assert lk.backends.available()[name] != "ok", name
    try:
        with lk.use_backend(name):
            layer(torch.randn(2, 4))
    except RuntimeError as error:
        assert f"{name!r} was asked for and cannot run" in str(error)
    else:
        raise AssertionError(name)
try:
    lk.save_adapter(layer, "nowhere")
except ImportError as error:
    assert "safetensors" in str(error)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/", env=os.environ | {"TRITON_INTERPRET": "0"})


@pytest.mark.parametrize(
    "name, words", [("reference", "linear_lowrank: reference"), ("fast", "backend: expected one of cuda, triton, cpu, composed, reference, got 'fast'")]
)
def test_backend_by_environment(name, words):
    script = "import lorakernels as lk; print(lk.explain(lk.LoraLinear(4, 4)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", env=os.environ | {"LORAKERNELS_BACKEND": name})
    assert words in done.stdout + done.stderr


def test_an_unbuilt_tree_beside_an_installed_build_says_so(tmp_path):
    """A source tree without its build hides an installed one where python is started beside it."""
    site, tree = tmp_path / "site", tmp_path / "tree"
    for folder in (site, tree):
        shutil.copytree(PACKAGE, folder / "lorakernels", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    (site / "lorakernels" / "_build.json").write_text('{"built": [], "left_out": {}}')
    info = site / f"lorakernels-{lk.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lorakernels\nVersion: {lk.__version__}\n")
    (info / "RECORD").write_text("lorakernels/_build.json,,\n")
    left = tree / "lorakernels.egg-info"  # as building leaves it in the source tree
    left.mkdir()
    (left / "PKG-INFO").write_text((info / "METADATA").read_text())
    (left / "SOURCES.txt").write_text("lorakernels/__init__.py\n")
    environment = os.environ | {"PYTHONPATH": str(site)}
    out = subprocess.run([sys.executable, "-m", "lorakernels"], check=True, capture_output=True, text=True, cwd=tree, env=environment).stdout
    assert f"{tree}/lorakernels is a source tree that was never built" in out
    assert f"an installed build is hidden by this source tree: {site}/lorakernels" in out


def test_python_m_lorakernels_tells_what_there_is():
    out = subprocess.run([sys.executable, "-m", "lorakernels"], check=True, capture_output=True, text=True, cwd="/").stdout
    for word in (lk.__version__, "torch", "devices", "built", "backends", "order", *backends.NAMES):
        assert word in out
    for name, state in backends.available().items():
        if name != "triton":  # the tests run Triton in its interpreter, the command does not
            assert f"{name}: {state}" in out


def test_public_names():
    assert sorted(lk.__all__) == lk.__all__
    assert all(getattr(lk, name).__doc__ for name in lk.__all__)


def test_dropout_constants_are_the_native_ones():
    text = (ROOT / "csrc" / "philox.h").read_text() if (ROOT / "csrc").exists() else pytest.skip("no source tree")
    for constant in (*dropout.MULTIPLIERS, *dropout.KEY_STEPS):
        assert f"0x{constant:08X}" in text
    assert f"PHILOX_ROUNDS = {dropout.ROUNDS};" in text


def test_dtype_codes_are_the_native_ones():
    from lorakernels.backends.native import DTYPES

    text = (ROOT / "csrc" / "params.h").read_text() if (ROOT / "csrc").exists() else pytest.skip("no source tree")
    names = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    assert all(f"{names[str(dtype)[6:]]} = {code}" in text for dtype, code in DTYPES.items())


# -- the native CPU module -------------------------------------------------------------------------------------------------


def native_cpu():
    why = backends.why_not("cpu", "cpu", torch.float32)
    if why:
        pytest.skip(why)
    return backends.load("cpu").module()


def run_again(isa, *plugin):
    """The error-rule tests once more with one instruction set forced, in a process of its own."""
    chosen = "test_ranks or test_widths or test_dropout or share_x or fresh_memory or test_in_place_add or test_native_kernels_bits or same_mask"
    nf4 = "test_shapes_and_dtypes or test_rows_across or test_long_rows or test_layouts or boundaries or zeros or every_backend or every_block_size or any_layout or gives_bitsandbytes"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *plugin]
    command += [str(ROOT / "tests" / f"test_{name}.py") for name in ("lora_linear", "native_kernels", "nf4", "nf4_linear")] + ["-k", f"({chosen} or {nf4}) and not triton and not reference and not composed"]
    environment = {"LORAKERNELS_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_each_instruction_set_gives_right_results(isa):
    usable = native_cpu().isas().get(isa)
    if not usable:
        pytest.skip(f"{isa} is {'not on this processor' if usable is False else 'not compiled for it'}")
    if isa == native_cpu().isa():
        pytest.skip(f"{isa} is what all other tests run here")
    run_again(isa)


WIDE = [pytest.param("avx512", marks=pytest.mark.full), pytest.param("avx512bf16", marks=pytest.mark.full), "amx"]


@pytest.mark.parametrize("isa", WIDE)
def test_what_this_processor_lacks_gives_right_results_where_it_is_emulated(isa):
    if native_cpu().isas().get(isa):
        pytest.skip(f"this processor has {isa}: it is tested as it is")
    if emulated_cpu.why_not():
        pytest.skip(f"no emulation of {isa}: {emulated_cpu.why_not()}")
    run_again(isa, "-p", "emulated_cpu")


@pytest.mark.parametrize("isa", WIDE)
def test_what_is_emulated_builds_where_nobody_needs_it(isa):
    """An intrinsic that SIMDe has not, and csrc/emulation does not add, would show on narrower processors only."""
    if not native_cpu().isas().get("avx512bf16"):
        pytest.skip("this processor lacks avx512bf16: the tests of what is emulated build it")
    if why := emulated_cpu.why_not() or (emulated_cpu.simde() is None and emulated_cpu.NO_SIMDE):
        pytest.skip(f"no emulation of {isa}: {why}")
    assert emulated_cpu.build(isa, tiles=False).exists()


def test_unknown_instruction_set_is_explained():
    native_cpu()
    script = "import lorakernels as lk; print(lk.backends.available()['cpu'])"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=os.environ | {"LORAKERNELS_CPU_ISA": "mmx"}, cwd="/").stdout
    assert "LORAKERNELS_CPU_ISA=mmx: expected one of portable" in out


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_wide_instructions_stay_in_their_own_functions():
    """No function outside the avx512 (avx2) namespace-local code uses zmm (ymm): else an older processor meets it."""
    module = native_cpu()
    listing = subprocess.run(["objdump", "-d", "-C", "--no-show-raw-insn", module.__file__], check=True, capture_output=True, text=True).stdout
    undefined = subprocess.run(["objdump", "-t", "-C", module.__file__], check=True, capture_output=True, text=True).stdout
    assert "zmm" in listing or not module.isas().get("avx512", False) or os.uname().machine != "x86_64"
    weak = [line for line in undefined.splitlines() if " w " in line and "lk::" in line]
    assert not weak, weak


# -- the tree --------------------------------------------------------------------------------------------------------------


def test_no_tolerance_is_typed_outside_numerics():
    tests = Path(__file__).parent
    for path in tests.glob("*.py"):
        text = path.read_text()
        for word in ("ato" + "l=", "rto" + "l=", "allclo" + "se", "assert_clo" + "se", "pytest.appr" + "ox", "xfa" + "il"):
            assert word not in text, f"{path.name}: {word}"
