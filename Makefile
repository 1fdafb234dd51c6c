# `make run` and `make test` need Python 3.11 or later, and set up everything else in .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: run test check format docs bench fuzz clean

# ARGS="--port 9000" passes options on; settings also come from .env and the environment.
run: $(READY)
	$(BIN)/twistd -n --pidfile= inference-gateway $(ARGS)

# ARGS="-k stream" passes options to pytest.
test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Writes what is made from the settings table.
docs: $(READY)
	$(BIN)/python -c 'from gateway.core import settings; print(settings.markdown(), end="")' > docs/configuration.md
	$(BIN)/python -c 'from gateway.core import settings; print(settings.env_example(), end="")' > .env.example

# What it measures, and how: ARGS=--help. Two peers, a faster load and plots: $(BIN)/python -m pip install --group bench
bench: $(READY)
	$(BIN)/python -m bench $(ARGS)

# A minute for each side of the wire; ARGS="-max_total_time=600" takes longer. What breaks is written to a file crash-*.
fuzz: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group fuzz
	$(BIN)/python -m tests.fuzz.fuzz_server $(ARGS)
	$(BIN)/python -m tests.fuzz.fuzz_backend $(ARGS)

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	@touch $(READY)
