# `make run` and `make test` need only Python 3.11-3.14, git and make: they make .venv, install into it, and go on.
PYTHON ?= python3
VENV ?= .venv
JOB ?= quickstart
JOBS ?= 2
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# gradio and what it needs beside what is there
DEMO := gradio gradio_client hf-gradio brotli fastapi groovy opentelemetry-api orjson pydub python-multipart pytz safehttpx semantic-version starlette tomlkit uvicorn 'audioop-lts; python_version >= "3.13"'
# experiments and benchmarks have their own targets: nbdev_test runs the library's notebooks
SKIP := ^([_.]|experiments$$|benchmarks$$)

NEWEST_AUTOENCODER = $$(ls -d runs/pretrain_autoencoder-*/autoencoder | tail -1)

# what `make lowest` runs: it needs nothing but the package and pytest
LIGHT := tests/test_queries.py tests/test_conditioning.py tests/test_correlation.py tests/test_filtering.py

.PHONY: help run test style test-kill lowest gpu fuzz env hooks docs readme prepare benchmarks fullsize pretrain dist clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(STAMP) ## make .venv and install; does nothing where settings.ini, setup.py, constraints.txt and jupyter_server_config.py are unchanged
$(STAMP): settings.ini setup.py constraints.txt jupyter_server_config.py
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 14) else f"uniemo needs Python 3.11 to 3.14, but $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@# open_clip_torch is here for its vocabulary file alone, which a test reads: its requirements would replace torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps open_clip_torch
	@# gradio asks for Pillow below 13 and runs with it; the numbers of the tests are those of Pillow 13, to the bit
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps $(DEMO)
	@$(MAKE) --no-print-directory hooks
	@touch $@

hooks: ## git merges notebooks with nbdev and trusts them after a merge; JupyterLab opens them unchanged
	@mkdir -p $(VENV)/etc/jupyter && cp jupyter_server_config.py $(VENV)/etc/jupyter
	@if git rev-parse --git-dir >/dev/null 2>&1; then git config --local include.path ../.gitconfig; \
	hook=$$(git rev-parse --git-path hooks)/post-merge; mkdir -p $$(dirname $$hook); \
	test -e $$hook || { printf '#!/bin/sh\nPATH="$$(git rev-parse --show-toplevel)/.venv/bin:$$PATH" nbdev_trust\n' > $$hook; chmod +x $$hook; }; fi

run: env ## the main job: make run, or make run JOB=name
	uniemo run $(JOB)

test: export OMP_NUM_THREADS := 1
# a step of training needs the memory again that the last one freed: see the page *threads*
test: export GLIBC_TUNABLES := glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456
test: env style ## every notebook, every test, and the checks that keep the notebooks honest
	nbdev_test --n_workers $(JOBS) --skip_folder_re '$(SKIP)'
	python -m pytest tests -n $(JOBS) --dist worksteal

style: env ## ruff: format and rules, over notebooks, package, tests
	ruff format --check
	ruff check

test-kill: env ## twenty trainings killed at a random moment and resumed, each must end bit for bit as an unbroken one
	UNIEMO_KILLS=20 python -m pytest tests/test_training.py -k random_moment

lowest: ## the least versions that settings.ini allows, in .venv-lowest, the light tests and a run with them (with CUDA's libraries 6 GB)
	@test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q -c constraints-lowest.txt -e . pytest
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q $(LIGHT)
	@# a run of a notebook, whose kernel must end
	timeout 300 .venv-lowest/bin/uniemo run tests/fixtures/tiny.ipynb --runs-dir .venv-lowest/runs

gpu: env ## one accelerator, some minutes: quickstart, full-size steps, equality, speeds (without one: a dry run)
	python tests/gpu.py

fuzz: env ## 20,000 mutated files, each ends right or in one clear error (make test tries 1,000)
	UNIEMO_FUZZ=20000 python -m pytest tests/test_fuzz.py

docs: env ## the site, offline, in _docs
	python tests/house.py docs

readme: env ## README.md from nbs/index.ipynb
	python tests/house.py readme

prepare: env ## before a commit: export, format, clean, side bar, README
	ruff format nbs tests
	nbdev_export
	python tests/house.py shelves
	ruff format uniemo
	ruff check
	nbdev_clean
	python tests/house.py sidebar readme

benchmarks: env ## run nbs/benchmarks and keep their outputs
	for nb in $(wildcard nbs/benchmarks/*.ipynb); do jupyter nbconvert --to notebook --execute --inplace $$nb && nbdev_clean --fname $$nb || exit 1; done

fullsize: env ## CLIP ViT-L/14 and Stable Diffusion 1.5 with random weights on the CPU: peak memory and time (about 10 GB, some minutes)
	python tests/fullsize.py --out tests/fullsize.json

pretrain: env ## train the mini world's foundation models from scratch (about 5 hours on two cores)
	uniemo run pretrain_clip
	# the second world's begins as the first's; clip_middle is kept on the way
	uniemo run pretrain_clip -p world 2.0 -p start mini -p steps 600 -p learning_rate 6e-4 -p eval_every 50
	uniemo run pretrain_autoencoder
	uniemo run pretrain_diffusion -p vae_folder $(NEWEST_AUTOENCODER)
	# the second world's begins as the first's
	uniemo run pretrain_autoencoder -p world 2.0 -p start mini -p latent_channels 8 -p perceptual true
	uniemo run pretrain_diffusion -p world 2.0 -p vae_folder $(NEWEST_AUTOENCODER) -p mirror true
	uniemo run pretrain_judge

dist: env ## wheel and sdist, in dist
	python -m build --no-isolation

clean: ## remove what was built (runs/ and .venv stay)
	rm -rf _docs _proc _play _play.lock build dist *.egg-info .pytest_cache .ruff_cache nbs/.last_checked
	find nbs uniemo tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
