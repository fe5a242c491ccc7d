# The two commands: `make demo` and `make test`. Each sets up .venv first, unless that is done.
VENV := .venv
READY := $(VENV)/.ready
JOBS ?= 1
PYTEST := $(VENV)/bin/python -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile)

.PHONY: help demo test test-slow lint types clean
help:
	@echo "make demo       fit scIMF to a shipped time series, predict a held-out day, write table and figures"
	@echo "                (then $(VENV)/bin/scjax demo scdfm: held-out pairs of perturbations)"
	@echo "make test       run the tests (make test-slow: the long ones; JOBS=2: in two processes)"
	@echo "make lint       ruff"
	@echo "make types      pyright (the extra dev, with its own node)"
	@echo "PYTHON=/path/to/python make ...   sets up with that interpreter"

demo: $(READY)
	$(VENV)/bin/scjax demo

test: $(READY)
	$(PYTEST)

test-slow: $(READY)
	$(PYTEST) -m slow

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(VENV)/.types
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) .cache

$(READY): pyproject.toml constraints.txt .ci/setup
	sh .ci/setup $(VENV)

$(VENV)/.types: $(READY)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
