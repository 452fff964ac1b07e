PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test reliability audit browser lint format clean

# A model of coloured shapes in a few minutes on a CPU; then says where everything is and what to type next.
quickstart: .venv/installed
	$(BIN)/calotype run shapes --preset tiny --out runs/quickstart

test: .venv/installed-dev browser
	$(BIN)/python -m pytest -n 2 --dist loadscope

# What goes wrong on purpose: kills, power loss, hostile files, fuzzed requests; `RELIABILITY=--nightly` for full sizes.
reliability: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadscope -m reliability $(RELIABILITY)

# Known security holes in what is installed; says SKIPPED where no database can be asked, fails where one knows of any.
audit: .venv/installed-dev
	$(BIN)/python .ci/audit.py

# Debian's Chromium for the tests of the demo, where it is missing and may be installed; without it they are skipped.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { apt-get install -qq -y --no-install-recommends chromium >/dev/null 2>&1 || \
	    { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } >/dev/null 2>&1; }; } || \
	echo "No Chromium, and it cannot be installed here: the tests of the demo in a browser will be SKIPPED."

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Calotype needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
