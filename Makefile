# `make` lists the targets. `make m0` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RECIPE ?= cai.toml
RUN ?= runs/latest
ARGS ?=
TORCH_INDEX_URL ?=
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
# Hundreds of test processes import the package: without byte code on disk each of them compiles it anew.
unexport PYTHONDONTWRITEBYTECODE
# Fast tests sync thousands of small files: in memory, where there is a gigabyte of it to spare.
IN_MEMORY := $(shell test -w /dev/shm && df -m /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 > 1024 {print "TMPDIR=/dev/shm"}')
# As many tests at once as there are cores, at most eight (each worker imports everything) and four with a model.
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
WORKERS := $(shell echo $$(( $(CORES) < 8 ? $(CORES) : 8 )))
MODELS := $(shell echo $$(( $(CORES) < 4 ? $(CORES) : 4 )))

.DEFAULT_GOAL := help
.PHONY: help setup lm-eval m0 m1 m2 m3 resume report review chat exam status doctor supervise test test-fast test-long test-gpu test-page test-faults check fix clean

help: ## list the targets
	@grep -hE '^[a-z0-9 -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(STAMP) ## create .venv and install the pinned requirements (TORCH_INDEX_URL=... for another CUDA)

$(STAMP): requirements.txt requirements-unsloth.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make setup PYTHON=python3.12")'
	@echo "Installing the pinned packages into $(VENV): 3 GB on disk with a CPU build of torch, more with CUDA (keep 20 GB free); some silent minutes."
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX_URL),$(PIP) install -q torch==2.13.0 --index-url $(TORCH_INDEX_URL))
	$(PIP) install -q -r requirements.txt
	$(PIP) install -q --no-deps -r requirements-unsloth.txt
	touch $(STAMP)

lm-eval: setup ## install lm_eval, for recipes with [evaluation] lm_eval = [...]
	$(PIP) install -q -r requirements-lm-eval.txt

m0 m1 m2 m3: setup ## run a milestone: 1, 10, 100 or 5,000 items
	$(PY) runner.py $(RECIPE) --milestone $@ $(ARGS)

resume: setup ## go on with a run (RUN=runs/<id>, the latest by default)
	$(PY) runner.py $(RECIPE) --resume $(RUN) $(ARGS)

report: setup ## write report.html and report.md of RUN again
	$(PY) runner.py $(RECIPE) --report $(RUN)

review: setup ## mark critiques and revisions of RUN by hand
	$(PY) runner.py $(RECIPE) --review $(RUN) $(ARGS)

chat: setup ## talk to base and tuned of RUN side by side
	$(PY) runner.py $(RECIPE) --chat $(RUN) $(ARGS)

exam: setup ## the metrics' own exam on the labelled set
	$(PY) runner.py $(RECIPE) --exam tests/exam.jsonl $(ARGS)

status: setup ## one screen about RUN
	$(PY) runner.py $(RECIPE) --status $(RUN)

doctor: setup ## check machine, versions, model and recipe
	$(PY) runner.py $(RECIPE) --doctor $(ARGS)

supervise: setup ## keep RUN going: restart after exit 75, with back-off (preemptible machines)
	$(PY) -m cai.commands.supervise $(RECIPE) --resume $(RUN) $(ARGS)

test: setup ## fast tests and whole runs on the fake model, then the slow ones on the embedded model
	$(IN_MEMORY) $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu and not faults and not long and not browser"
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(MODELS) --dist loadfile -m "slow and not faults and not long"

test-fast: setup ## fast tests only (no torch; a minute on two cores)
	$(IN_MEMORY) $(PY) -m pytest -n $(WORKERS) --dist worksteal

test-long: setup ## the engine against the reference on 200 prompts
	$(PY) -m pytest -m long

test-gpu: setup ## tests that need a CUDA GPU
	$(PY) -m pytest -m gpu tests/gpu

test-page: setup ## the report in headless Chromium: contrast, headings, widths (needs chromium on the path)
	$(PIP) install -q --no-deps axe-playwright-python==0.1.8
	$(PY) -m pytest -m browser tests/report/test_browser.py

test-faults: setup ## inject faults into whole runs
	$(IN_MEMORY) OMP_NUM_THREADS=1 $(PY) -m pytest -n $(MODELS) --dist loadgroup --no-loadscope-reorder -m faults

check: setup ## format, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

fix: setup ## let ruff format and mend what it can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean: ## remove .venv and caches (never runs/)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
