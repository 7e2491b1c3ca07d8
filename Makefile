# Ways in: venv demo test test-fast rehearse lint test-gpu bench gpu gpu-wheels clean
PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CXX_FILES := $(shell find csrc bench tests/build tests/bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help venv native ptxsim demo test test-fast rehearse lint test-gpu bench gpu gpu-native gpu-probes gpu-validate gpu-wheels clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

# A torch that this Python already has is used; else the pinned one comes first, so that nothing later chooses another.
.venv/bin/python:
	if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages .venv; else $(PYTHON) -m venv .venv; fi

.venv/installed: pyproject.toml setup.py build_backend/toolchain.py | .venv/bin/python
	$(PY) -c 'import torch' 2>/dev/null || $(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet 'setuptools>=77' wheel 'pybind11>=2.12'
	@# Apart from what torch brings: a CUDA build of torch has a CUDA runtime of its own, of another version.
	$(PIP) install --quiet --no-deps --target .venv/nvcc $$($(PY) -m build_backend --requirements) \
	  || echo 'The pinned nvcc cannot be had: an nvcc of this machine is used, or the CUDA images will be missing.'
	$(PIP) install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

# Both decide by content what is stale, so they run every time.
native: .venv/installed
	@$(PY) -m build_backend --null-driver

ptxsim: .venv/installed
	@if [ -f csrc/ptxsim/Makefile ]; then $(MAKE) --no-print-directory -C csrc/ptxsim; fi

venv: .venv/installed native ptxsim  ## set up .venv: the package (editable), its tools, its images and the simulator

demo: venv  ## the main job: a real checkpoint, from disk to tokens
	.venv/bin/dsv3 demo

# A worker per core; a test that spreads over processes of its own is one worker's.
WORKERS ?= -n logical --maxprocesses 8 --dist worksteal

test: venv  ## every test that needs no GPU
	$(PY) -m pytest tests $(WORKERS) $(PYTEST_ARGS)

test-fast: venv  ## the same without the slow ones
	$(PY) -m pytest tests $(WORKERS) -m 'not slow' $(PYTEST_ARGS)

# Tensor cores and approximations round as a GPU's do.
rehearse: venv  ## the tests of a GPU, on a make-believe one
	DSV3_KERNELS_SIM=rounding=hardware,approximate=1 $(PY) -m pytest $(GPU_TESTS) --rehearse $(WORKERS) $(PYTEST_ARGS)

lint: .venv/installed  ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy dsv3_kernels
	@$(if $(CXX_FILES),.venv/bin/clang-format --dry-run -Werror $(CXX_FILES))

# The GPU targets use the python3 that has torch; they build in place and install nothing outside build/.
GPU_PY := PYTHONPATH=$(CURDIR):$(CURDIR)/build/gpu-site $(PYTHON)
GPU_NEEDS := hypothesis pytest pytest-xdist rich safetensors tokenizers
# What a GPU can decide: the rest is the same anywhere, and the node's minutes are few.
GPU_TESTS ?= tests/quant tests/gemm tests/mla tests/moe tests/test_gpu.py

build/gpu-site: $(wildcard .whl/*.whl)
	mkdir -p $@
	@missing=$$($(PYTHON) -c 'import sys; from importlib.metadata import distributions; have = {d.name.lower() for d in distributions()}; print(*[n for n in sys.argv[1:] if n not in have])' $(GPU_NEEDS)); \
	if [ -n "$$missing" ]; then \
	  $(PYTHON) -m pip install --quiet --target $@ $(if $(wildcard .whl/*.whl),--no-index --find-links .whl) $$missing; \
	fi
	touch $@

gpu-native: build/gpu-site
	$(GPU_PY) -m build_backend --null-driver

test-gpu: gpu-native  ## the tests on a GPU; one that is missing is a failure
	$(GPU_PY) -m pytest $(GPU_TESTS) --gpu $(WORKERS) $(PYTEST_ARGS)

bench: gpu-native  ## side by side with the peers that are at hand
	$(GPU_PY) -m bench.run $(BENCH_ARGS)

gpu gpu-probes gpu-validate: export BENCH_OUT := $(or $(BENCH_OUT),$(OUT),$(CURDIR)/build/gpu-out)
gpu-probes: gpu-native
	@mkdir -p "$$BENCH_OUT"
	$(GPU_PY) tests/ptxsim/probes.py --out "$$BENCH_OUT/probes.jsonl"

gpu-validate: gpu-native
	@mkdir -p "$$BENCH_OUT"
	$(GPU_PY) -m dsv3_kernels validate --jsonl "$$BENCH_OUT/bench.jsonl"

gpu:  ## build, GPU tests, a quick benchmark and `dsv3 validate` in ten minutes; a log and a JSONL in $BENCH_OUT
	@PYTHON='$(PYTHON)' bash .ci/gpu

gpu-wheels:  ## fill .whl/ for a GPU machine without a package index
	$(PYTHON) -m pip download --quiet --dest .whl --only-binary=:all: --implementation cp --python-version 3.12 --abi cp312 --abi abi3 --abi none \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 $(GPU_NEEDS)

clean:  ## everything that was built; .venv stays
	rm -rf build dist dsv3_kernels/images dsv3_kernels/_host.*.so *.egg-info
