# make quickstart   set up .venv; train, decode and score the tiny recipe; read a person with base
# make test         all tests               make check   style, types, layers, README commands
# make newest       what we build upon in its newest versions, and the tests that would notice
# make bench        what we claim about speed            make clean   remove .venv and caches
# make torture      every kill, full disk and fault, not only a sample: takes most of an hour
#
# PYTHON  the Python that makes the environment, 3.11 or later
# VENV    where the environment is

PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
TEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.isthmus-installed
PIN := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip install --disable-pip-version-check
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test torture newest check bench clean install
.DELETE_ON_ERROR:

quickstart: $(STAMP)
	$(BIN)/isthmus quickstart

test: $(STAMP)
	$(BIN)/pytest -n 2 $(TEST_ARGS)

torture: $(STAMP)
	ISTHMUS_TORTURE=1 $(BIN)/pytest tests/torture $(TEST_ARGS)

# what pip makes of pyproject.toml alone; a name of theirs that is on its way out is an error
newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --disable-pip-version-check "torch==$(PIN)" -c constraints.txt
	$(NEWEST)/bin/python -m pip install --disable-pip-version-check --upgrade \
	    -e ".[gguf]" transformers peft pytest
	$(NEWEST)/bin/pytest -q -W error::FutureWarning -k "not compiled and not real_parts" \
	    tests/test_cold_start.py tests/test_weights.py \
	    tests/decoding/test_beam.py tests/decoding/test_steps.py \
	    $(addprefix tests/model/test_,$(addsuffix .py,cache encoder gguf layers_of_models llm packing \
	    quantise speech_llm weights))

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py $(wildcard tests/test_readme.py)

bench: $(STAMP)
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "isthmus needs Python 3.11 or later, and '$(PYTHON)' is not that:" \
	         "say make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# torch first and by its pin, so that nothing else chooses another build
	$(PIP) "torch==$(PIN)" -c constraints.txt
	$(PIP) -e ".[dev,synth]" -c constraints.txt
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
