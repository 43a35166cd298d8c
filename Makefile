# make setup       install everything into .venv (torch first); nothing outside it is touched
# make quickstart  train a Chinchilla-sized model on this machine's own Python library, in about five minutes
# make test        the tests
# make check       format, lint, types, imports, and every CUDA source through nvcc where it exists
# make bench       the races of docs/benchmarks
# make soak        the tests plus the full-size trials
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py tools/setup.sh $(shell find csrc -type f)

.PHONY: setup setup-dev quickstart test check bench soak clean

setup: $(VENV)/.ready

setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready: $(SOURCES)
	@PYTHON=$(PYTHON) tools/setup.sh $(VENV)

$(VENV)/.ready-dev: $(VENV)/.ready
	@PYTHON=$(PYTHON) tools/setup.sh $(VENV) dev

quickstart: setup
	@$(BIN)/python tools/quickstart.py $(ARGS)

test: setup-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

soak: setup-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" -v $(ARGS)

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/compile_cuda.py

bench: setup
	@$(BIN)/dist-llm bench step --threads 1

clean:
	rm -rf $(VENV) build *.egg-info dist_llm/_C.so dist_llm/_build_info.json
