# fastdeq's commands. `make train ARGS="model=skip_deq data=digits"` is all a first run needs.

PYTHON ?= $(shell python3.11 -c "print('python3.11')" 2>/dev/null || echo python3)
RUN    := .venv/bin/python
# What training needs, until all is installed; and all that the other targets need.
TRAIN  := $(if $(wildcard .venv/.installed),.venv/.installed,.venv/.experiment)
READY  := .venv/.installed

.PHONY: help train test test-fast check docs bench clean

help:
	@echo 'make train ARGS="..."   train; ARGS are overrides of conf/train.yaml'
	@echo 'make test  ARGS="..."   run the tests; ARGS go to pytest'
	@echo 'make test-fast          those that take at most a few seconds each'
	@echo 'make check              format, lint and types'
	@echo 'make docs               build the documentation into site/; a warning is an error'
	@echo 'make bench ARGS="..."   run the benchmarks: one table, and JSON in build/; --only, --quick'
	@echo 'make clean              remove .venv, caches and builds; outputs/ stays'
	@echo 'Each makes .venv and installs into it what it needs, once.'
	@echo 'Another interpreter: PYTHON=/path/to/python3'

train: $(TRAIN)
	$(RUN) train.py $(ARGS)

# One process per core, and one thread in each; the tests of a file share fixtures and stay together,
# in the order of tests/conftest.py. Many tests start fastdeq: its bytecode is kept.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) $(ARGS)

test-fast: $(READY)
	$(PYTEST) -m "not slow" $(ARGS)

check: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

bench: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.run $(ARGS)

clean:
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed again when the dependencies change.
.venv/.experiment: EXTRAS := experiment
.venv/.installed: EXTRAS := experiment,ode,images,plots,safetensors,wandb,tensorboard,cluster,joblib,optuna,docs,dev
.venv/.experiment .venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fastdeq needs Python 3.11 or newer, but $(PYTHON) is %d.%d: say make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
