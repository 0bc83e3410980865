# The doors of the project. Each makes .venv when it is absent and needs a Python 3.11+ and a package index, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The torch that `make constraints` resolves everything else around.
TORCH ?= 2.13.0
# The lowest one that pyproject.toml allows, for `make lowest`, and how it is installed.
TORCH_LOWEST ?= $(shell sed -nE 's/^  "torch>=([0-9.]+)".*/\1.0/p' pyproject.toml)
LOWEST_TORCH ?= build/lowest/bin/pip install --quiet --disable-pip-version-check --no-deps
# A demo never overwrites an earlier one.
DEMO_OUT := $(or $(DEMO_OUT),runs/demo-$(shell date +%Y%m%d-%H%M%S))

.PHONY: help demo soak fuzz test quick test-all mutants bench gpu docs lint check format constraints lowest clean

help: ## This list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 24

demo: $(VENV)/installed-demo ## Learn the order of one article, then what to read from texts never seen
	$(BIN)/preceptor run reading --preset default --threads 2 --out $(DEMO_OUT)/order
	$(BIN)/preceptor run reading --preset study --threads 2 --out $(DEMO_OUT)/study

test: $(VENV)/installed-test ## All tests but the slow ones, with the examples of docstrings and docs; then two minutes of campaigns
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow"
	rm -rf build/slice
	$(BIN)/python -m campaigns soak --seconds 60 --out build/slice crash-points full-disk write-errors flips races
	$(BIN)/python -m campaigns fuzz --seconds 60 --out build/slice configurations arguments articles corpora models pages

quick: $(VENV)/installed-test ## The mathematics and one system, in under a minute
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow" src/preceptor/objectives tests/objectives tests/systems/bandit

test-all: $(VENV)/installed-test ## The slow tests too
	$(BIN)/python -m pytest

mutants: $(VENV)/installed-test ## Plant every fault of tools/mutants/faults.yaml: hours, resumable (MUTANTS="--only lm --jobs 2")
	nice -n 15 $(BIN)/python -m tools.mutants $(MUTANTS)

soak: $(VENV)/installed-test ## Kills, crash points, full disks, flips, races; hours, resumable (SOAK="--seconds 600")
	$(BIN)/python -m campaigns soak $(SOAK)

fuzz: $(VENV)/installed-test ## Malformed input of every kind; hours, resumable (FUZZ="--seconds 600")
	$(BIN)/python -m campaigns fuzz $(FUZZ)

bench: $(VENV)/installed-test ## Every benchmark beside its peer (BENCH=decode for one); a clean commit adds lines to benchmarks/history.jsonl
	$(BIN)/python -m benchmarks $(BENCH)
	$(BIN)/python -m benchmarks.report

gpu: $(VENV)/installed-test ## All that is measured and tested on a GPU, in 8 minutes, with rows as it goes (GPU="--minutes 5 decode")
	$(BIN)/python -m benchmarks.gpu_session $(GPU)

docs: $(VENV)/installed-docs ## The documentation as a site in site/
	$(BIN)/mkdocs build --strict

lint: $(VENV)/installed-dev ## Format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test ## Everything that must hold before a merge

format: $(VENV)/installed-dev ## Rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch goes first: with it in place, nothing later can pull in another build of it (pip prefers a local CPU build it can
# see, and the packages that depend on torch would otherwise be free to ask for the index's own).
$(VENV)/installed-%: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(if $(filter-out demo,$*),[$*])'
	@touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Preceptor needs Python 3.11 or newer, '$(PYTHON)' is not; say which with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

constraints: ## Resolve every dependency anew into constraints.txt
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/pip install --quiet torch==$(TORCH)
	build/constraints/bin/pip install --quiet -e '.[dev]'
	{ echo "# Every package of the demo, the tests and the checks. Made by: make constraints (a fresh venv, pip freeze)"; \
	  build/constraints/bin/pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' | LC_ALL=C sort -f; } > constraints.txt
	rm -rf build/constraints

# torch goes first and without its dependencies: uv keeps what is installed, and takes the lowest of everything else.
lowest: ## Every system's smoke run with the lowest versions that pyproject.toml allows
	rm -rf build/lowest
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/pip install --quiet --disable-pip-version-check uv
	$(LOWEST_TORCH) torch==$(TORCH_LOWEST)
	build/lowest/bin/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct -e .
	for system in reading bandit curriculum surgery; do \
	  build/lowest/bin/preceptor run $$system --preset smoke --threads 1 --out build/lowest/runs/$$system || exit 1; \
	done

clean: ## Remove the virtual environment and every cache; runs stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
