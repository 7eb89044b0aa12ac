# make quickstart | test | test-slow | test-web | test-cluster | test-gpu | bench | bench-gpu | checks | types | clean
PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
STAMP    := $(VENV)/.installed
FIXTURES ?= ../shared
THREADS  ?= 1
# Fixtures are optional: without the folder the golden tests are skipped, each with one line.
FIXTURES_OPTION := $(if $(wildcard $(FIXTURES)/golden),--fixtures $(FIXTURES))
PYTEST   := OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest $(FIXTURES_OPTION)
SOURCES  := pipeline stages ops launch ds_configs
LINKS    := $(SOURCES:%=build/importroot/cogview2/%)
ALONE    := tests/unit tests/golden tests/repo
BENCH    := benchmarks/local_attention
BENCH_TRAINING := benchmarks/training
WEB_STAMP := $(VENV)/.installed-web
CHROMIUM ?= $(firstword $(foreach name,chromium chromium-browser google-chrome google-chrome-stable,$(shell command -v $(name))))
# On a GPU machine nothing is installed: the Python that is named, else that of .venv where there is one, takes the
# package from the checkout. It needs torch, numpy and, for the tests, pytest.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
GPU_RUN    := PYTHONPATH=$(CURDIR)/build/importroot $(GPU_PYTHON)

.PHONY: quickstart test test-slow test-web chromium test-cluster test-gpu bench bench-gpu checks types install clean

quickstart: $(STAMP)
	$(BIN)/cogview2 run quickstart

# The first need one process each, and share the cores; the others start ranks of their own.
test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu and not web and not cluster" -n 2 --dist loadfile $(ALONE)
	$(PYTEST) -m "not slow and not gpu and not web and not cluster" tests $(ALONE:%=--ignore=%)

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu and not cluster" tests

test-web: chromium $(WEB_STAMP)
	CHROMIUM="$(CHROMIUM)" $(PYTEST) -m web tests/web

chromium:
	@test -n "$(CHROMIUM)" || { echo "make test-web needs a Chromium on PATH (Debian, Ubuntu: apt install chromium), or its path: make test-web CHROMIUM=/path/to/it" >&2; exit 1; }

$(WEB_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .[dev,web] playwright
	touch $@

# Hosts as network namespaces: needs root. Without root, or where the kernel forbids them, its tests say so and are skipped.
test-cluster: $(STAMP)
	tests/cluster/tools.sh
	$(PYTEST) -m cluster tests/cluster

# Only conftest.py of tests/gpu is read: the others import what a GPU machine need not have.
test-gpu: $(LINKS)
	$(GPU_RUN) -m pytest -p no:cacheprovider --confcutdir tests/gpu -m gpu tests/gpu

bench: $(STAMP)
	$(BIN)/python $(BENCH)/bench_cpu.py --results benchmarks/RESULTS.md --json build/bench_cpu.json
	$(BIN)/python benchmarks/sampling/bench_sampling.py --turns 1 --results benchmarks/RESULTS.md --json build/bench_sampling.json
	$(BIN)/python $(BENCH_TRAINING)/bench_loss.py --results benchmarks/RESULTS.md --json build/bench_loss.json
	OMP_NUM_THREADS=1 $(BIN)/python $(BENCH_TRAINING)/bench_engine.py --results benchmarks/RESULTS.md --json build/bench_engine.json
	$(BIN)/python $(BENCH_TRAINING)/bench_checkpoint.py --folder build --results benchmarks/RESULTS.md --json build/bench_checkpoint.json
	$(BIN)/python $(BENCH_TRAINING)/bench_recovery.py --folder build --results benchmarks/RESULTS.md --json build/bench_recovery.json

bench-gpu: $(LINKS)
	$(GPU_RUN) $(BENCH)/bench_gpu.py --results benchmarks/RESULTS.md --json build/bench_gpu.json
	$(GPU_RUN) $(BENCH_TRAINING)/bench_loss.py --device cuda --dtype bfloat16 --hidden 3072 --batch 16 --positions 6400 --results benchmarks/RESULTS.md --json build/bench_loss_gpu.json
	$(GPU_RUN) $(BENCH_TRAINING)/bench_gpu_training.py --profile build/gpu_training_profile.txt --results benchmarks/RESULTS.md --json build/bench_gpu_training.json

checks: $(STAMP) types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/codespell -L debgu,paht,caf $(SOURCES) benchmarks tests docs README.md CONTRIBUTING.md CHANGELOG.md

types: $(STAMP) $(LINKS)
	$(BIN)/mypy -p cogview2

# mypy does not see through the editable install; it reads the same files by these links.
build/importroot/cogview2/%:
	mkdir -p build/importroot/cogview2
	ln -sfn ../../../$* $@

install: $(STAMP)

# torch first and by exact version, so that no other distribution picks another build of it.
$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt) -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .[dev]
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(SOURCES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
