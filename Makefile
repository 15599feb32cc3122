# The two commands of the README are `make demo` and `make test`; each makes its own virtual environment the first time.

PYTHON ?= python3
VENV ?= .venv
COMPAT ?= .venv-compat
BIN := $(VENV)/bin
TORCH := 2.13.0
# Several test processes, one a processor (psutil counts them), but not so many that memory runs out.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test test-portable test-slow fuzz test-compat check format bench bench-width bench-experts bench-7b bench-forgetting clean help

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

# Makes the virtual environment $(1). torch goes first: without a GPU its CPU build is enough, and saves gigabytes. uv knows where that build lies.
define venv-with-torch
$(PYTHON) -m venv $(1)
$(1)/bin/pip install --quiet --disable-pip-version-check --upgrade pip
if nvidia-smi -L >/dev/null 2>&1; then \
	$(1)/bin/pip install --quiet torch==$(TORCH); \
else \
	$(1)/bin/pip install --quiet torch==$(TORCH)+cpu 2>/dev/null \
	|| { $(1)/bin/pip install --quiet uv && $(1)/bin/uv pip install --quiet --python $(1)/bin/python --torch-backend=cpu torch==$(TORCH); } \
	|| $(1)/bin/pip install --quiet torch==$(TORCH); \
fi
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call venv-with-torch,$(VENV))
	$(BIN)/pip install --quiet -c constraints.txt -e '.[train,plot,dev]'
	touch $@

$(COMPAT)/.installed: tests/compat/requirements.txt
	$(call venv-with-torch,$(COMPAT))
	$(COMPAT)/bin/pip install --quiet -r $<
	touch $@

demo: $(VENV)/.installed  ## pretrain a small model, grow it, verify it, train it further with and without EWC (about 3 minutes)
	$(BIN)/hf-grow demo

test: $(VENV)/.installed  ## the tests (some minutes, no GPU, no network)
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

test-portable: $(VENV)/.installed  ## the tests as on other processors, with one and two threads, in random order; goes on where it was interrupted
	$(BIN)/python tests/portable.py

$(VENV)/.eval: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[eval]'
	touch $@

test-slow: $(VENV)/.eval  ## tests that take minutes or gigabytes, evaluation tasks among them
	$(BIN)/python -m pytest -q -m slow

fuzz: $(VENV)/.installed  ## 10,000 mutated files and odd command lines (hours; prints its seed, keeps bad endings in build/fuzz)
	$(BIN)/python tests/fuzz/worker.py --cases 10000

test-compat: $(VENV)/.installed $(COMPAT)/.installed  ## grown checkpoints load alike in transformers 4.57 (an environment of its own)
	rm -rf build/compat
	$(BIN)/python tests/compat/write.py build/compat
	$(COMPAT)/bin/python tests/compat/check.py build/compat

check: $(VENV)/.installed  ## lint, format, types, and the order of the modules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

format: $(VENV)/.installed  ## let ruff format everything
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## a 1.1B-shaped checkpoint, 22 to 34 layers, beside cp
	$(BIN)/python benchmarks/conversion.py --size 1b --layers-to 34 --repeats 5

bench-width: $(VENV)/.installed  ## the same checkpoint at twice the width (needs 20 GB of disk)
	$(BIN)/python benchmarks/conversion.py --size 1b --method tile --factor 2 --repeats 3

bench-experts: $(VENV)/.installed  ## the same checkpoint with eight experts (needs 30 GB of disk)
	$(BIN)/python benchmarks/conversion.py --size 1b --method experts --experts 8 --repeats 3

bench-7b: $(VENV)/.installed  ## the exact Mistral-7B config to 10.7B (needs 60 GB of disk)
	$(BIN)/python benchmarks/conversion.py --size 7b --layers-to 48 --repeats 1

bench-forgetting: $(VENV)/.installed  ## what continued pretraining forgets, and what helps (about an hour; goes on where it was interrupted)
	$(BIN)/python benchmarks/forgetting.py --seeds 3

clean:  ## remove the virtual environment and everything made
	rm -rf $(VENV) $(COMPAT) build/compat build/portable demo-out benchmarks/out .pytest_cache .mypy_cache .ruff_cache .hypothesis
