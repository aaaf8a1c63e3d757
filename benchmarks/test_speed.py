"""pytest-benchmark over the suite's own rows: `pytest benchmarks/` times them with standard tooling (--benchmark-json, --benchmark-compare);
`--benchmark-disable` runs each once. Every result is held against float64 first."""

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

from benchmarks import accuracy
from benchmarks.cases import is_ours
from benchmarks.run import Options, plan, ready

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = Options(DEVICE, ["lora", "nf4", "multi"], ["calls", "design"] if DEVICE == "cuda" else ["calls"], quick=True, graphs=False)


@pytest.mark.parametrize("case", plan(OPTIONS), ids=lambda case: f"{case.op} {case.mode} {case.label()}")
def test_speed(benchmark, case):
    work = ready(case, OPTIONS)
    judged = accuracy.judge(work, case.base)
    mine = [c for c in work.contenders if is_ours(c.name) and not c.bare]
    assert mine and all(judged[c.name]["match"] for c in mine), judged
    contender = mine[0]

    def call():
        contender.call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(flops=work.flops, bytes=work.bytes, error=judged[contender.name]["error"])
    with contender.context():
        benchmark.pedantic(call, setup=contender.ready, rounds=20, iterations=1, warmup_rounds=2)
