PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint format clean

# A model of coloured shapes in a few minutes on a CPU; then says where everything is and what to type next.
quickstart: .venv/installed
	$(BIN)/calotype run shapes --preset tiny --out runs/quickstart

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadscope

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Calotype needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
