# make demo   quantize the embedded sample, from nothing to a bundle
# make test   lint, types and the whole test suite
# Both set up .venv with the pinned versions first; `make setup` alone does only that, and is quick when nothing changed.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK := $(shell cat requirements.lock pyproject.toml | sha256sum | cut -c1-16)
STAMP := $(VENV)/lock-$(LOCK)

.PHONY: setup demo test test-fast lint wheel clean

setup: $(STAMP)

$(STAMP):
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(STAMP)

demo: setup
	$(BIN)/gcvit-edge quantize --recipe int8_ptq --output demo --force

lint: setup
	$(BIN)/ruff check .
	$(BIN)/pyright

# one file of tests a process, one thread each: two processes of two threads would wait for each other most of the time
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

test: lint
	$(PYTEST) --durations=15

test-fast: lint
	$(PYTEST) -m "not slow"

wheel: setup
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf demo dist build
