"""What is built, what is left out and said, and what is refused: setup.py's decisions, and (full) whole wheels."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def setup(tmp_path, tools=("c++",), **environment):
    """Run setup.py's planning with only these tools on the PATH, which never compile anything."""
    for tool in tools:
        fake = tmp_path / tool
        fake.write_text(
            "#!/bin/sh\ncase $1 in --version) echo 'release 13.0, V13.0.88';; --list-gpu-arch) echo 'compute_75\ncompute_80\ncompute_90\ncompute_100\ncompute_120';;"
            f" --query-gpu=compute_cap) echo '{environment.get('FAKE_GPU', '')}';; esac\n"
        )
        fake.chmod(0o755)
    clean = {n: v for n, v in os.environ.items() if n not in ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "LORAKERNELS_BUILD")}
    script = "import shutil, sys, json; real = shutil.which; shutil.which = lambda c, **k: None if c.startswith('/usr/local/cuda') else real(c, **k); sys.argv = ['setup.py', '--name']; names = {'__name__': 'setup', '__file__': 'setup.py'}; exec(open('setup.py').read(), names); print('PLAN', json.dumps(names['PLAN']))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=clean | environment | {"PATH": str(tmp_path)})
    plan = next((json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("PLAN ")), None)
    return plan, done.stderr


def test_everything_is_there(tmp_path):
    plan, said = setup(tmp_path, ("c++", "nvcc"))
    assert plan["built"] == ["_cpu", "_cuda"] and plan["left_out"] == {} and plan["cuda"] == "13.0"
    assert plan["architectures"] == ["80-real", "90a-real", "100-real", "120-real", "80-virtual"]


def test_no_nvcc_is_said_with_the_remedy(tmp_path):
    plan, said = setup(tmp_path)
    assert plan["built"] == ["_cpu"]
    assert "nvcc was not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH); install the CUDA toolkit" in plan["left_out"]["_cuda"]
    assert "_cuda left out: nvcc was not found" in said


def test_no_compiler_is_a_pure_python_package(tmp_path):
    plan, said = setup(tmp_path, ("nvcc",))
    assert plan["built"] == [] and "no C++ compiler found" in plan["left_out"]["_cpu"] and "no C++ compiler found" in said


@pytest.mark.parametrize(
    "environment, tools, words",
    [
        ({"FORCE_CUDA": "1"}, ("c++",), "FORCE_CUDA=1, but nvcc was not found"),
        ({"LORAKERNELS_BUILD": "cuda"}, ("c++",), "LORAKERNELS_BUILD=cuda, but nvcc was not found"),
        ({"LORAKERNELS_BUILD": "cpu"}, (), "LORAKERNELS_BUILD=cpu, but no C++ compiler found"),
        ({"LORAKERNELS_BUILD": "cuda"}, ("nvcc",), "LORAKERNELS_BUILD=cuda, but no C++ compiler found"),
        ({"LORAKERNELS_BUILD": "gpu"}, ("c++",), "LORAKERNELS_BUILD: expected auto, cpu, cuda or none, got 'gpu'"),
        ({"LORAKERNELS_BUILD": "cpu", "FORCE_CUDA": "1"}, ("c++", "nvcc"), "FORCE_CUDA=1 contradicts LORAKERNELS_BUILD=cpu"),
        ({"TORCH_CUDA_ARCH_LIST": "sm90"}, ("c++", "nvcc"), "TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 12.0+PTX, got 'sm90'"),
    ],
)
def test_what_is_asked_for_and_cannot_be_built_is_an_error(tmp_path, environment, tools, words):
    plan, said = setup(tmp_path, tools, **environment)
    assert plan is None and words in said and "Traceback" not in said


@pytest.mark.parametrize(
    "environment, built",
    [({"LORAKERNELS_BUILD": "none"}, []), ({"LORAKERNELS_BUILD": "cpu"}, ["_cpu"]), ({"FORCE_CUDA": "0"}, ["_cpu"]), ({"LORAKERNELS_BUILD": "cuda"}, ["_cpu", "_cuda"])],
)
def test_switches(tmp_path, environment, built):
    plan, _ = setup(tmp_path, ("c++", "nvcc"), **environment)
    assert plan["built"] == built
    assert set(plan["left_out"]) == {"_cpu", "_cuda"} - set(built)


@pytest.mark.parametrize(
    "environment, architectures",
    [
        ({"TORCH_CUDA_ARCH_LIST": "8.0;9.0a+PTX"}, ["80-real", "90a-real", "90a-virtual"]),
        ({"TORCH_CUDA_ARCH_LIST": "8.6 12.0"}, ["86-real", "120-real"]),
        ({"FAKE_GPU": "9.0"}, ["90a-real"]),
        ({"FAKE_GPU": "8.9"}, ["80-virtual"]),  # a toolkit that does not know the visible GPU still serves it by PTX
    ],
)
def test_architectures(tmp_path, environment, architectures):
    plan, _ = setup(tmp_path, ("c++", "nvcc", "nvidia-smi"), **environment)
    assert plan["architectures"] == architectures


# -- whole builds ------------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("mode", ["none", "cpu", "auto"])
def test_wheels_hold_only_lorakernels(tmp_path, mode):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", ".cache", "_build.json", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path / "wheels", source]
    subprocess.run(command, check=True, env=os.environ | {"LORAKERNELS_BUILD": mode})
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lorakernels"}
    built = json.loads(zipfile.ZipFile(wheel).read("lorakernels/_build.json"))
    native = {name.split("/")[1].split(".")[0] for name in names if name.endswith(".so")}
    assert native == set(built["built"]) and ("none-any" in wheel.name) == (mode == "none")
    assert not any("test" in name or "csrc" in name for name in names)
    second = subprocess.run(command, check=True, env=os.environ | {"LORAKERNELS_BUILD": "none"})  # a kept build folder leaks nothing
    pure = next((tmp_path / "wheels").glob("*none-any.whl"))
    assert second.returncode == 0 and not any(name.endswith(".so") for name in zipfile.ZipFile(pure).namelist())
