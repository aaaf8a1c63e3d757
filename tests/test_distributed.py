"""Layers over the ranks of torch.distributed: DDP, FSDP2, tensor parallelism. The checks themselves are in two_ranks.py."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["nf4_fsdp2", "data_parallel", "tensor_parallel"])
def test_two_ranks(name):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(Path(__file__).parent / "two_ranks.py"), name]
    ranks = [subprocess.Popen([*command, str(rank), port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in ranks:
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0 and out.strip().endswith("ok"), error[-2000:]
