# Everything a developer types. `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
READY := .venv/.ready

.PHONY: help setup demo test fast lint types unit docs fuzz format wheel check-bare check-network check-jetson check-export check-tensorrt check-python check-oldest check-cpp models clean check-browser check-ray

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(READY) ## make .venv with everything for development

# The stamp is newer than pyproject.toml: a changed dependency installs anew, nothing else does.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version); training and export need Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "error: Python's venv module is missing; install it: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	@# Types for pyright alone; the package it asks for, TensorRT itself, is not on PyPI.
	$(BIN)/pip install --quiet --no-deps 'tensorrt-stubs==10.13.*'
	@touch $(READY)

# One thread computes and one process reads images: the networks are too small to share over two cores.
demo: export OMP_NUM_THREADS = 1
demo: $(READY) ## draw a field guide, train, export, predict; some minutes on two cores
	$(BIN)/mge-field-guide $(DEMO)/field-guide
	$(BIN)/mge-train --data $(DEMO)/field-guide --out $(DEMO)/run --overwrite --epochs 10 $(RECIPE)
	$(BIN)/mge-eval --ckpt $(DEMO)/run/best.pt --data $(DEMO)/field-guide
	$(BIN)/mge-export --ckpt $(DEMO)/run/best.pt -o $(DEMO)/mge.plan --verify-data $(DEMO)/field-guide/val
	$(BIN)/mge-run --engine $(DEMO)/mge.plan $(DEMO)/field-guide/test/*-scarlet-*/*0.png --save $(DEMO)/drawn
	@$(BIN)/mge-run --engine $(DEMO)/mge.plan $$(ls $(DEMO)/field-guide/test/golden-hooded-scarlet-*/*.png | head -n 1)
	@echo; echo "the bundle is $(DEMO)/mge.plan; what each expert saw is drawn in $(DEMO)/drawn"

# A backbone that learns from nothing, at the size the birds are drawn for; see docs/lab/results.md for the longer run.
RECIPE = --recipe paper --arch plainnet_w16 --init none --image-size 112 --resize 128 --batch-size 16 --schedule onecycle \
  --backbone-lr 0.05 --head-lr 0.05 --weight-decay 5e-4 --label-smoothing 0.1 --diversity none --parts-per-class 4 \
  --box-threshold 0.3 --workers 1 --accelerator cpu

test: lint types unit ## everything that CI checks: lint, types, tests

lint: $(READY) ## style, imports that point the wrong way
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## pyright, strict on the runtime
	$(BIN)/pyright

unit: $(READY) ## the tests, two at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

fast: $(READY) ## the runtime's quick tests, while you edit: under a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m 'not slow' tests/runtime tests/test_options.py

docs: $(READY) ## the site in build/site; links and docstrings are checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

fuzz: $(READY) ## some 27,000 damaged and forged inputs; `make test` tries 500
	MGE_FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest -q --timeout 0 tests/runtime/test_fuzz_*.py

format: $(READY) ## format the sources
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

wheel: $(READY) ## build the wheel into dist/
	$(BIN)/python -m hatchling build -t wheel

check-bare: wheel ## install the wheel alone, predict without torch
	$(BIN)/python tests/runtime/tiny_chain.py dist/tiny.plan
	benchmarks/check_bare.sh dist/tiny.plan $(PYTHON)

check-network: $(READY) ## does a predicting process ask for a host or write anything? twenty seconds under strace
	MGE_NETWORK_SECONDS=20 $(BIN)/python -m pytest -q tests/test_privacy.py

check-jetson: wheel ## would pip find everything on JetPack 6 (Python 3.10, aarch64)? nothing is installed
	PATH="$(CURDIR)/$(BIN):$$PATH" benchmarks/check_jetson.sh

check-export: $(READY) ## every gate, sharing, image sizes and source size in FP32 and FP16, TensorRT-RTX too
	MGE_ALL_COMBINATIONS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/export/test_combinations.py

check-browser: $(READY) ## examples/browser in headless Chromium against the runtime (fetches onnxruntime-web, 150 MB)
	npm install --prefix examples/browser --no-package-lock --no-fund --no-audit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/browser

check-ray: $(READY) ## bulk prediction by two workers of Ray, one killed; first: .venv/bin/pip install 'ray[data]'
	RAY_worker_niceness=0 $(BIN)/python -m pytest -q --timeout 600 tests/runtime/test_ray_bulk.py

check-tensorrt: $(READY) ## do the bindings of TensorRT 10.3, 10.16 and 11.4 hold every name that we use?
	benchmarks/check_tensorrt.sh $(BIN)/python

check-python: wheel ## the runtime's tests on another Python: make check-python OTHER=python3.10, as on JetPack 6
	benchmarks/check_python.sh $(OTHER)

check-oldest: ## training and export with the oldest packages that pyproject allows (downloads about 6 GB)
	benchmarks/check_oldest.sh $(PYTHON)

check-cpp: ORT_INCLUDE ?= /usr/include/onnxruntime
check-cpp: $(READY) ## examples/cpp against the runtime; ORT_INCLUDE=FOLDER: ONNX Runtime's headers, SHARED=FOLDER: 100 photographs
	ORT_INCLUDE="$(ORT_INCLUDE)" MGE_PHOTOGRAPHS="$(if $(SHARED),$(SHARED)/data/groceries/test)" OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -q tests/test_cpp.py

# A training in RUNS that was stopped goes on, one that is finished is taken. See docs/guide/try.md.
models: RUNS ?= runs/worth
models: $(READY) ## make models/groceries.plan again, SHARED=FOLDER with data/groceries and weights; two hours
	@[ -d "$(SHARED)/data/groceries" ] || { echo "error: no folder $(SHARED)/data/groceries: make models SHARED=FOLDER"; exit 1; }
	$(BIN)/python -m benchmarks.worth $(SHARED) $(RUNS) groceries-backbone
	$(BIN)/mge-export --ckpt $(RUNS)/groceries-backbone-s0/best.pt --fp16 --target onnx \
	  --verify-data $(SHARED)/data/groceries/val --verify-images 0 -o models/groceries.plan
	$(BIN)/mge-calibrate models/groceries.plan --data $(SHARED)/data/groceries/val
	$(BIN)/mge-export --engine models/groceries.plan --card models/groceries.md --test-data $(SHARED)/data/groceries
	$(BIN)/mge-run --engine models/groceries.plan models/photographs

clean: ## remove what the other targets made, the environment too
	rm -rf .venv dist build $(DEMO) runs .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
