# Everything is installed inside .venv. Calling a target again does only what is missing.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
PYTHON ?= python3
# the version of PyTorch that is tested; make TORCH=2.9.0 installs another
TORCH ?= 2.13.0
BIN := .venv/bin

.PHONY: demo test test-all gpu lint clean

# Chat with the model in the box, train it on a corpus it has not seen, show what changed, chat again.
# make demo DATA=mine.jsonl uses your own conversations. Without a terminal, the chats are scripted.
CORPUS := $(if $(DATA),mine-$(firstword $(shell cksum '$(DATA)' 2>/dev/null)),chitchat)
OUT := out/demo-$(CORPUS)
$(if $(DATA),$(if $(wildcard $(DATA)),,$(error DATA=$(DATA): no such file)))

demo: .venv/installed
	@echo '--- the model in the box (Ctrl-D: go on to training it, Ctrl-C: end the demo)'
	@mkdir -p out; $(call chat,nano)
	@echo '--- trained on $(CORPUS), for a few minutes'
	@$(MAKE) --no-print-directory $(OUT)/trained
	@echo '--- before and after'
	$(BIN)/python evaluate.py --base=nano --init_from=$(OUT) --dataset=$(CORPUS) --max_conversations=60 --replies=60 --probes=20
	@echo '--- the trained model'
	@$(call chat,$(OUT))

chat = if [ -t 0 ]; then $(BIN)/python chat.py --init_from=$(1); else \
	  printf '%s\n' 'Hello! My name is Nora.' 'How are you today?' 'I have a dog, her name is Luna.' \
	    'What do you like to do?' 'What is my name?' 'Bye!' > out/said.txt; \
	  $(BIN)/python chat.py --init_from=$(1) < out/said.txt | paste -d '\n' out/said.txt - | sed '/^Bot: /!s/^/You: /'; fi

# an interrupted training resumes
$(OUT)/trained: | data/$(CORPUS)/train.bin data/recall/train.bin
	$(BIN)/python train.py config/demo.py --dataset=$(CORPUS)$(if $(DATA),:20),recall$(if $(DATA),:0.05) --out_dir=$(OUT) \
	  $$([ -e $(OUT)/last/state.pt ] && echo --init_from=resume)
	@grep -q "\"iter\": $$(sed -n 's/^max_iters = //p' config/demo.py), \"train_loss\"" $(OUT)/metrics.jsonl || \
	  { echo 'training stopped early; make demo continues it'; exit 1; }
	@touch $@

data/chitchat/train.bin: | .venv/installed
	$(BIN)/python prepare/chitchat.py

data/recall/train.bin: | .venv/installed
	$(BIN)/python prepare/recall.py --conversations=20000

data/mine-%/train.bin: | .venv/installed
	$(BIN)/python prepare/jsonl.py --source='$(DATA)' --out_dir=data/mine-$*

# The tests need no network once installed. test-all adds the slow ones.
test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: .venv/installed-all
	$(BIN)/python -m pytest -n auto --dist worksteal -m ''

# For whoever has a GPU: its tests, then the figures of "On a GPU" in benchmarks/README.md
gpu: .venv/installed-dev
	$(BIN)/python -m pytest -m '' tests/test_cuda.py
	$(BIN)/python benchmarks/decode.py --device=cuda --dtype=bfloat16
	$(BIN)/python benchmarks/decode.py --device=cuda --dtype=bfloat16 --rows=64
	$(BIN)/python benchmarks/train.py --device=cuda --batch_size=16 --block_size=1024 --compile=true --steps=20
	$(BIN)/python benchmarks/serve.py --device=cuda --dtype=bfloat16

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "installing into .venv (PyTorch is large: up to 5 GB, minutes on a slow connection)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.venv/installed-all: .venv/installed-dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,lm-eval,browser]'
	@touch $@

# The environment, the prepared data and the trained weights
clean:
	rm -rf .venv data out *.egg-info
