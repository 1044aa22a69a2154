# make demo and make test do all the set-up themselves, in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check
# compat: a plain path entry, so that a script beside the checkout does not take its folder for the package
EDITABLE := --no-build-isolation --config-settings editable_mode=compat --editable
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help demo test test-dist test-integrations lint format info bench plots docs gpu cuda-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(VENV)/torch: # torch comes first: the build needs it, and an index of the user's choice may serve it (PIP_INDEX_URL)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)" numpy setuptools pybind11 ninja
	@touch $@

$(VENV)/fastmtl: $(VENV)/torch $(SOURCES)
	$(PIP) $(EDITABLE) ".[demo]"
	@touch $@

$(VENV)/test: $(VENV)/fastmtl
	$(PIP) $(EDITABLE) ".[demo,test]"
	@touch $@

$(VENV)/peers: $(VENV)/fastmtl # what the benchmarks compare with stays out of the environment of demo and tests
	$(PIP) "torchjd[full]==0.18.0" && touch $@ || echo "NO COMPARISON WITH TORCHJD: it could not be installed"

$(VENV)/integrations: $(VENV)/test # so do the libraries of docs/integrations.md, at the versions that it names
	$(PIP) torchjd==0.18.0 lightning==2.6.6 transformers==5.23.0 accelerate==1.15.0
	@touch $@

$(VENV)/lint: $(VENV)/fastmtl
	$(PIP) $(EDITABLE) ".[lint]"
	@touch $@

$(VENV)/docs: $(VENV)/torch pyproject.toml # pages are made from the docstrings: nothing needs to be compiled
	FASTMTL_NO_EXT=1 $(PIP) $(EDITABLE) ".[docs]"
	@touch $@

demo: $(VENV)/fastmtl ## train 25 tasks on customer reviews with every method: a table and plots in demo-output/
	$(BIN)/python -m fastmtl demo $(ARGS)

# a file's tests stay in one process, in order: some share processes or what they have compiled
test: $(VENV)/test ## all tests that need no GPU
	FASTMTL_REQUIRE_EXT=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder $(ARGS)

test-dist: $(VENV)/test ## the tests of many processes in full, and their example
	FASTMTL_REQUIRE_EXT=1 $(BIN)/python -m pytest -m "not slow or slow" tests/test_distributed*.py $(ARGS)
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 examples/distributed.py

test-integrations: ## the tests with TorchJD, Lightning, Accelerate, Transformers, in .venv-integrations
	$(MAKE) --no-print-directory VENV=.venv-integrations .venv-integrations/integrations
	FASTMTL_REQUIRE_EXT=1 .venv-integrations/bin/python -m pytest tests/integrations $(ARGS)

lint: $(VENV)/lint ## style, docstrings, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.h' 'benchmarks/*.cpp')

format: $(VENV)/lint ## reformat everything
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.h' 'benchmarks/*.cpp')

info: $(VENV)/fastmtl ## what is installed, and what to do
	$(BIN)/python -m fastmtl info

bench: ## CPU benchmarks into benchmarks/results/, against TorchJD, in .venv-bench
	$(MAKE) --no-print-directory VENV=.venv-bench .venv-bench/peers
	.venv-bench/bin/python -m benchmarks $(ARGS)
	$(MAKE) --no-print-directory plots

plots: ## draw benchmarks/results/*.png from the CSV
	$(MAKE) --no-print-directory VENV=.venv-bench .venv-bench/fastmtl
	.venv-bench/bin/python -m benchmarks.plots

docs: ## a site of README, docs/ and the docstrings into build/docs/, in .venv-docs; warnings are errors
	$(MAKE) --no-print-directory VENV=.venv-docs .venv-docs/docs
	rm -rf build/docs
	PYTHONWARNINGS=ignore .venv-docs/bin/python -m sphinx -q -W --keep-going -c docs . build/docs
	@echo build/docs/index.html

cuda-check: ## compile the CUDA kernels for every architecture; spills are errors (needs nvcc)
	$(PYTHON) tests/cuda_check.py --arch all

gpu: ## on a machine with a GPU, torch and nvcc: build, GPU tests, sanitizer, benchmark (no registry needed)
	$(PYTHON) -m benchmarks.gpu

clean: ## remove what was built
	rm -rf $(VENV) .venv-bench .venv-docs .venv-integrations build docs/api dist fastmtl.egg-info fastmtl/_C*.so demo-output
