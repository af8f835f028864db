# make demo | test | lint | docs | clean. All work in .venv, which they make from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO := demo

.PHONY: demo test lint docs clean

demo: $(VENV)/.installed
	mkdir -p $(DEMO)
	$(BIN)/opsig train --task fashion-mnist --learning-rate 0.1 --steps 400 --track --replace -o $(DEMO)/run.h5 --format table
	$(BIN)/opsig mine $(DEMO)/run.h5 --figure $(DEMO)/movers.png --top 10 --format table
	$(BIN)/opsig cluster $(DEMO)/run.h5 --figure $(DEMO)/pairs.png --format table
	$(BIN)/opsig report $(DEMO)/run.h5 -o $(DEMO)/report.html --format table

test: $(VENV)/.tools
	$(BIN)/python -m pytest -q

lint: $(VENV)/.tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	$(BIN)/python docs/make_reference.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_site
	@echo "Open docs/_site/index.html in a browser."

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --constraint constraints.txt --editable '.[jax-test]' || echo "No JAX here: its tests are skipped."
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) docs/_site dist .pytest_cache .ruff_cache .hypothesis
