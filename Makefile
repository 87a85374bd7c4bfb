# Two commands set everything up: `make demo` and `make test`. Each makes .venv on first use.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export OMP_NUM_THREADS ?= $(shell nproc)

.PHONY: help demo test check format lab bench bench-quality clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

.venv/base: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/base
	$(PIP) --editable '.[s3,server,remote,lmcache,profile,ray,dev]'
	touch $@

## make demo    share a KV cache between two fine-tuned models, and see what it saves
demo: .venv/base
	$(PY) -m droidspeak demo

## make test    run the tests
test: .venv/dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

## make check   lint, formatting, types
check: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

## make format  rewrite the formatting
format: .venv/dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

## make lab     train the lab's models anew
lab: .venv/dev
	$(PY) -m lab.train

## make bench   measure, and write docs/benchmarks
bench: .venv/dev
	$(PY) -m benchmarks

## make bench-quality  measure quality on all pairs of the lab, and write docs/benchmarks/quality.md
bench-quality: .venv/dev
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.quality

## make clean   remove .venv and caches
clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
