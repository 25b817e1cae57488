# Every target sets up what it needs in .venv; the first call of any of them installs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The store of `make quickstart`; the same folder again reuses everything that is finished.
STORE ?= store
# The study of `make report`, a name in experiments/.
STUDY ?= nano_paper

.DEFAULT_GOAL := help
.PHONY: help setup quickstart quickstart-video test test-slow test-kills check lint type bench gpu-check report picture docs clean nano-paper plan-paper

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Install tinylmm and its tools into .venv

# torch first and pinned: on its own, a dependency that asks for any torch could bring another build of several GB.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

quickstart: $(STAMP)  ## Train a small multimodal model in stages and report it: two CPU cores, no network, minutes
	TINYLMM_STORE=$(STORE) $(BIN)/tinylmm-train

quickstart-video: $(STAMP)  ## Train a small model that watches videos, and report what it owes to time: two CPU cores, minutes
	TINYLMM_STORE=$(STORE) $(BIN)/tinylmm-train llm=nano_video vt=nano_video recipe=video 'video.sampling={uniform: 8}' launch.slots=2

# Coverage doubles a test's time, and what is left to cover behind the unit tests is not worth that in the others.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
test: $(STAMP)  ## Run the quick test suite, with coverage of the units (some 20 minutes on two cores)
	$(PYTEST) -m "not slow and not gpu" tests/unit tests/conf tests/frozen --cov --cov-report=term:skip-covered --cov-fail-under=85
	$(PYTEST) -m "not slow and not gpu" tests/integration

test-slow: $(STAMP)  ## Run the long tests: kills and signals, DeepSpeed with faults
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

test-kills: $(STAMP)  ## Of the long tests, the kills and signals over torchrun (minutes)
	$(PYTEST) -m "slow and not gpu" -k "not alone" tests/integration/test_kills.py

check: lint type test  ## Everything that must pass before a commit

lint: $(STAMP)  ## Check style (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)  ## Check types (mypy)
	$(BIN)/mypy

bench: $(STAMP)  ## Measure before against after in one run; results go to benchmarks/results
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.reading
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.eval
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.significance
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.grid
	$(BIN)/python -m benchmarks.scaling

gpu-check: $(STAMP)  ## Run the tests that need a GPU, and measure it in eight minutes (benchmarks/gpu.py; skipped without one)
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks.gpu

nano-paper: $(STAMP)  ## Run the paper's questions at nano size: 39 models on two CPU cores, half an hour (experiments/nano_paper)
	$(BIN)/tinylmm-train experiment=nano_paper launch.slots=2 store=$(STORE)

plan-paper: $(STAMP)  ## Plan the paper's whole grid at full size: its runs, distinct stages, and what they would take
	$(BIN)/tinylmm plan experiment=paper store=$(STORE)

report: $(STAMP)  ## Report STUDY (a name in experiments/) as far as it has run in STORE
	$(BIN)/tinylmm report --store $(STORE) experiment=$(STUDY)

picture: $(STAMP)  ## Draw the README's picture from the newest finished run in STORE
	$(BIN)/tinylmm report --store $(STORE) --picture docs/quickstart.png

docs: $(STAMP)  ## Write docs/choices.md from conf/, and the picture of the rooms from the code
	$(BIN)/python docs/choices.py
	$(BIN)/python docs/architecture.py

clean:  ## Remove caches and build products (not .venv, not the store)
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.* htmlcov
	find src tests benchmarks conf -name __pycache__ -type d -prune -exec rm -rf {} +
