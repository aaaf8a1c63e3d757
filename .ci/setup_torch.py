"""Put torch into this environment: the small CPU build where there is no NVIDIA GPU, never gigabytes unasked.

`python setup_torch.py OUTER`: OUTER is the interpreter that the environment was made with; its CUDA torch is used if it has one.
TORCH (environment) overrides what is installed, as pip writes it: TORCH="torch==2.12.1", or a wheel's path or address.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

VERSION = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_SIZE = "about 3 GB with CUDA's packages"


def pip(*arguments):
    return subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]).returncode == 0


def outside(python):
    """[torch's version, its CUDA, its folder] if the outer interpreter is of our version and has a CUDA torch."""
    script = "import sys, os, torch; print(sys.version_info[:2], torch.__version__, torch.version.cuda, os.path.dirname(os.path.dirname(torch.__file__)), sep='|')"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True)
    version, *found = done.stdout.strip().split("|") if done.returncode == 0 else ["none"]
    return found if version == str(sys.version_info[:2]) and found[1] != "None" else None


def main():
    try:
        print(f"torch {importlib.metadata.version('torch')} is here")
        return
    except importlib.metadata.PackageNotFoundError:
        pass
    asked = os.environ.get("TORCH")
    if asked:
        print(f"installing {asked}, as TORCH says")
        sys.exit(not pip(*asked.split()))
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
        found = outside(sys.argv[1])
        if found:
            version, cuda, folder = found
            site = next(path for path in sys.path if path.startswith(sys.prefix) and path.endswith("site-packages"))
            with open(os.path.join(site, "outer_torch.pth"), "w") as file:
                file.write(folder + "\n")
            print(f"using torch {version} (CUDA {cuda}) of {folder}")
            return
        sys.exit(
            f"There is an NVIDIA GPU here, but no CUDA build of torch. It would fetch torch {VERSION}, {CUDA_SIZE}.\n"
            f"To do that:              make TORCH=torch=={VERSION} ...\n"
            f"To run on the CPU alone: make TORCH='torch=={VERSION}+cpu --extra-index-url {CPU_INDEX}' ..."
        )
    for what, arguments in (
        (f"torch {VERSION}+cpu", [f"torch=={VERSION}+cpu"]),
        (f"torch {VERSION}+cpu from PyTorch's own index", [f"torch=={VERSION}+cpu", "--extra-index-url", CPU_INDEX]),
    ):
        if sys.platform != "linux":  # elsewhere the ordinary build has no CUDA in it
            what, arguments = f"torch {VERSION}", [f"torch=={VERSION}"]
        print(f"installing {what}")
        if pip(*arguments):
            return
    sys.exit(
        f"No CPU build of torch {VERSION} could be had for Python {platform.python_version()}. The ordinary one is {CUDA_SIZE}.\n"
        f"To fetch it all the same: make TORCH=torch=={VERSION} ...; or make PYTHON=<another python> ..."
    )


if __name__ == "__main__":
    main()
