# Everything runs in $(VENV), made on first use. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
VENV_MINIMUM ?= .venv-minimum
CONSTRAINTS ?= constraints.txt
OUT ?= out
MODEL ?= resnet50

BIN := $(VENV)/bin
# Every install is bound by constraints, so that no dependency brings another torch.
PIP_INSTALL := $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS)
# The same targets with the oldest versions. Where nvcc is, the CUDA kernels must compile beside them.
export RESNET_FUSED_BUILD
MINIMUM := $(MAKE) VENV=$(VENV_MINIMUM) CONSTRAINTS=constraints-minimum.txt \
  RESNET_FUSED_BUILD=$(or $(RESNET_FUSED_BUILD),$(if $(shell command -v nvcc 2>/dev/null),cuda))

.PHONY: help demo test quick triton versions check-minimum check-minimum-quick ext lint docs bench clean

help:
	@echo "make demo    train, fuse, compare and time on real images; a chart and figures in $(OUT)/"
	@echo "make test    the test suite"
	@echo "make check-minimum  the oldest torch and triton, in $(VENV_MINIMUM) (5 GB): library, test suite, Triton configs"
	@echo "make ext     the compiled library, in place (the others do it too)"
	@echo "make lint    ruff (lint and format) and mypy"
	@echo "make docs    the pages of docs/ as a web site in $(OUT)/site"
	@echo "make bench   time $(MODEL), eager beside fused; MODEL=timm:resnet50 for another"
	@echo "make clean   remove $(VENV), $(OUT)/ and what the tools left"

demo: $(VENV)/.bench ext
	$(BIN)/resnet-fused demo --out $(OUT)

test: $(VENV)/.dev ext
	$(BIN)/python -m pytest -n auto --dist=worksteal

# The tests marked "minimum": what may differ between versions of torch and triton. Other files are not even imported.
quick: $(VENV)/.check ext
	$(BIN)/python -m pytest -n auto --dist=worksteal -m minimum $$(grep -rl --include='test_*.py' 'mark\.minimum' tests)

triton: $(VENV)/.check
	env -u TRITON_INTERPRET $(BIN)/python -W ignore -m resnet_fused.testing.triton_compile
	env -u TRITON_INTERPRET $(BIN)/python -W ignore -m resnet_fused.testing.triton_norm_compile

versions: $(VENV)/.torch
	@$(BIN)/python -m pip list --format=freeze | \
	  grep -E '^(torch|torchvision|triton|numpy|setuptools|pytest|onnx|onnxruntime|openvino|ray|timm|transformers)=='
	@$(BIN)/python --version

check-minimum:
	+$(MINIMUM) test triton
	@$(MINIMUM) --no-print-directory versions

check-minimum-quick:
	+$(MINIMUM) quick
	@$(MINIMUM) --no-print-directory versions

# What has not changed is not compiled again. RESNET_FUSED_BUILD says what is wanted; MAX_JOBS bounds the jobs.
ext: $(VENV)/.torch
	@if [ -z "$$RESNET_FUSED_BUILD" ] && ! command -v "$${CXX:-g++}" >/dev/null; then \
	  echo "make: no C++ compiler ($${CXX:-g++}): RESNET_FUSED_BUILD=none, everything but the compiled library works" >&2; \
	else $(BIN)/python setup.py --quiet build_ext --inplace; fi

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Strict: a link that leads nowhere, or a name without docstring in the reference, is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir $(abspath $(OUT))/site
	@echo "open $(OUT)/site/index.html"

bench: $(VENV)/.bench ext
	$(BIN)/resnet-fused bench $(MODEL)

clean:
	rm -rf $(VENV) $(VENV_MINIMUM) $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f resnet_fused/*.so
	find resnet_fused tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "make: $(PYTHON) is missing or older than Python 3.10; name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) 'setuptools>=77' wheel ninja torch
	@touch $@

$(VENV)/.bench $(VENV)/.check $(VENV)/.docs $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch pyproject.toml setup.py build_ext.py
	RESNET_FUSED_BUILD=none $(PIP_INSTALL) --no-build-isolation -e '.[$*]'
	@touch $@
