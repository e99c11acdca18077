# make demo   quantize the embedded sample, from nothing to a bundle
# make test   lint, types and the tests; what takes minutes each is in `make test-slow`
# Both set up .venv with the pinned versions first; `make setup` alone does only that, and is quick when nothing changed.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK := $(shell cat requirements.lock pyproject.toml | sha256sum | cut -c1-16)
STAMP := $(VENV)/lock-$(LOCK)

.PHONY: setup demo lint test test-slow wheel clean

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
	$(BIN)/ruff format --check --quiet .
	$(BIN)/pyright

# one file of tests a process, one thread each: two processes of two threads would wait for each other most of the time. Files in their
# order, of which backends/ takes longest: by number of tests, as is the default, those of few long tests would come last, on one CPU
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not slow" --durations=10

# the main job on the real models, and the deploy form of every variant up to 200 M parameters
test-slow: setup
	$(PYTEST) -m slow --durations=10

wheel: setup
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf demo dist build
