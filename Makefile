# `make run` and `make test` need Python 3.11 or later, and set up everything else in .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RULE := deploy/kubernetes/monitoring/prometheusrule.yaml

.PHONY: run test check audit format docs bench fuzz clean

# ARGS="--port 9000" passes options on; settings also come from .env and the environment.
run: $(READY)
	$(BIN)/twistd -n --pidfile= inference-gateway $(ARGS)

# ARGS="-k stream" passes options to pytest; ARGS="-n 0" runs one test after the other, in one process.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive src twisted

# Asks a public database for known weaknesses of the pinned versions. It takes a network, and its answer changes by itself.
audit: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group audit
	$(BIN)/pip-audit --requirement constraints.txt --disable-pip --no-deps

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Writes what is made from the settings table and from the alert rules.
docs: $(READY)
	$(BIN)/python -c 'from gateway.core import settings; print(settings.markdown(), end="")' > docs/configuration.md
	$(BIN)/python -c 'from gateway.core import settings; print(settings.env_example(), end="")' > .env.example
	sed -i '/^spec:$$/q' $(RULE)
	sed 's/^./  &/' deploy/prometheus/alerts.yml >> $(RULE)

# What it measures, and how: ARGS=--help. Two peers, a faster load and plots: $(BIN)/python -m pip install --group bench
bench: $(READY)
	$(BIN)/python -m bench $(ARGS)

# A minute for each side of the wire and for each seam that others' bytes come in at: half an hour. SEAMS="toml redis" are those
# alone, ARGS="-max_total_time=600" takes longer. What breaks is written to a file crash-*. See docs/fuzzing.md.
fuzz: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group fuzz
ifndef SEAMS
	$(BIN)/python -m tests.fuzz.fuzz_server $(ARGS)
	$(BIN)/python -m tests.fuzz.fuzz_backend $(ARGS)
endif
	for seam in $(or $(SEAMS),$$($(BIN)/python -m tests.fuzz.fuzz_seams)); do \
	  $(BIN)/python -m tests.fuzz.fuzz_seams $$seam $(ARGS) || exit; \
	done

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	@touch $(READY)
