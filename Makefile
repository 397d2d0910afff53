# Everything is made inside .venv; a second call of a target does only what is missing.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint clean

# Prepare a corpus, train on it from scratch, chat. Where there is no terminal, a scripted conversation.
demo: out/demo/trained
	@if [ -t 0 ]; then $(BIN)/python chat.py --init_from=out/demo; else \
	  said=out/demo/said.txt; \
	  printf '%s\n' 'Hello!' 'How are you today?' 'What do you like to do?' 'That is nice.' 'Bye!' > $$said; \
	  $(BIN)/python chat.py --init_from=out/demo < $$said | paste -d '\n' $$said - | sed '/^Bot: /!s/^/You: /'; fi

# an interrupted training goes on where it was
out/demo/trained: data/chitchat/train.bin
	$(BIN)/python train.py config/demo_cpu.py $(if $(wildcard out/demo/last/state.pt),--init_from=resume)
	@grep -q "\"iter\": $$(sed -n 's/^max_iters = //p' config/demo_cpu.py), \"train_loss\"" out/demo/metrics.jsonl || \
	  { echo 'stopped before its end: make demo goes on'; exit 1; }
	@touch $@

data/chitchat/train.bin: | .venv/installed
	$(BIN)/python prepare/chitchat.py

# The test suite: no network once installed, a few minutes on two cores. test-all adds the slow ones.
test: .venv/installed-dev
	$(BIN)/python -m pytest

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -m ''

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "installing into .venv (PyTorch is large: up to 5 GB, minutes on a slow line)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# The environment, the prepared data and the trained weights
clean:
	rm -rf .venv data out *.egg-info
