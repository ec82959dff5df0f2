# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DOCS_STAMP := $(VENV)/docs-installed

.PHONY: help test quick-tests test-all test-cpp test-gpu lint demo bench docs clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# One worker a core. Engines and eager models are measured with as many threads as there are cores: those that wait
# must sleep, or they take from the other workers what they need. A worker that dies ends the run: pytest-xdist waits
# forever for the other tests of its file.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest \
	-n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --durations 15

test: $(STAMP) ## everything that has to hold: lint, types, layers, tests, the wheel
	$(MAKE) --jobs 2 lint quick-tests

quick-tests: $(STAMP)
	$(PYTEST) -m "not slow" --ignore tests/cpp

test-all: lint ## test, with the tests marked slow, and coverage: its total and the ten worst files
	$(PYTEST) --cov --cov-report=
	$(BIN)/coverage report --sort=cover | awk 'NR <= 12 || /^TOTAL/'

test-cpp: $(STAMP) ## the C++ library: needs CMake, a compiler, OpenSSL's headers and a Debian mirror for the others
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cpp -rs

test-gpu: $(STAMP) ## what needs an NVIDIA GPU; `cpcompile doctor` says what else it needs
	$(BIN)/cpcompile doctor
	$(BIN)/python -m pytest tests/gpu -rs

lint: $(STAMP) ## ruff, strict mypy, the layers of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(STAMP) ## train, build and validate on text that every installation has
	$(BIN)/cpcompile demo --out demo

bench: $(STAMP) ## the figures of the README
	$(BIN)/python benchmarks/training_throughput.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/build_cost.py
	$(BIN)/python benchmarks/partition_quality.py

$(DOCS_STAMP): $(STAMP)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

docs: $(DOCS_STAMP) ## the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) demo site build dist *.egg-info
