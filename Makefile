# Two commands on a fresh machine: `make demo` and `make test`.  Each rule also works by hand.
#
#   make demo            photos -> tokens -> photos, on the shipped photos and VAE; results in runs/demo/
#   make test            the test suite
#   make check           lint, format, spelling and types (pre-commit runs the same)
#   make check-clang     every C++ file passes the syntax check of clang++ (CLANGXX=clang++-18 to name one)
#   make check-ubsan     kernel tests on a build with gcc's undefined-behavior sanitizer
#   make bench           measure (wants '.[bench]' for the peers); rows go to benchmarks/results/
#   make soak            10^10 pairs: no wrong index
#   make prove-files     kills, corruptions and hostile files: nothing lost, nothing silent, no traceback
#   make bench-gpu       the same on a CUDA device: correctness first, at most ten minutes
#   make PY=python demo  use the active environment, with the torch that is in it (never replaced)

TORCH ?= 2.13.0
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')
TEXTS := $(wildcard *.md *.toml *.py Makefile THIRD_PARTY_NOTICES) revq revq_kernels csrc benchmarks tests scripts docs
SOURCES := pyproject.toml setup.py $(CSRC)

ifeq ($(origin PY), undefined)
PY := .venv/bin/python
READY := .venv/.ready
MODELS := .venv/.drop-in
else
READY := active-environment
MODELS := active-environment-drop-in
endif

.PHONY: demo test check check-clang check-ubsan bench bench-gpu soak prove-files clean active-environment active-environment-drop-in

demo: $(READY)
	$(PY) -m revq demo

test: $(READY) $(MODELS)
	$(PY) -m pytest
	TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels -k triton

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c "import clang_format; clang_format.clang_format()" --dry-run --Werror $(CSRC)
	$(PY) -m codespell_lib $(TEXTS)
	$(PY) -m mypy

# The newest clang++ on the path, with all clones: clang finds what gcc accepts.  The include paths are torch's and pybind11's.
CLANGXX ?= $(shell for name in clang++ $$(seq -f clang++-%g 30 -1 12); do command -v $$name && break; done)
INCLUDES = $(shell $(PY) -c 'import sysconfig, pybind11; from torch.utils.cpp_extension import include_paths; \
  print(*("-isystem " + path for path in [*include_paths(), pybind11.get_include(), sysconfig.get_path("include")]))')

check-clang: $(READY)
	@test -n "$(CLANGXX)" || { echo "make check-clang: no clang++ found; install clang, or pass CLANGXX=<path>"; exit 1; }
	@$(CLANGXX) --version | head -1
	@includes='$(INCLUDES)'; for file in $$(find csrc -name '*.cpp' | sort); do \
	  $(CLANGXX) -std=c++20 -ffp-contract=off -Wall -Werror -fsyntax-only -Icsrc $$includes $$file || exit 1; done
	@echo "clang++ accepts $$(find csrc -name '*.cpp' | wc -l) files"

# A build of its own; its reports go to a file, because tests capture what is printed.  The sanitizer of virtual tables
# needs symbols of the executable, which is Python.
UBSAN := build/ubsan
UBSAN_TESTS := $(addprefix tests/kernels/test_,first_pass.py index.py index_bound.py contract.py count.py gradients.py)

check-ubsan: $(READY)
	rm -rf $(UBSAN)/lib $(UBSAN)/report.*; mkdir -p $(UBSAN)
	CFLAGS="-fsanitize=undefined -fno-sanitize=vptr" LDFLAGS="-fsanitize=undefined" REVQ_DEV=1 \
	  $(PY) setup.py -q build --build-temp $(UBSAN)/temp --build-lib $(UBSAN)/lib >$(UBSAN).log 2>&1 \
	  || { tail -30 $(UBSAN).log; exit 1; }
	@python=$$($(PY) -c 'import sys; print(sys.executable)') && cd $(UBSAN)/lib \
	  && $$python -c 'from revq_kernels import native; print("on", native.LIBRARY)' \
	  && UBSAN_OPTIONS=log_path=$(CURDIR)/$(UBSAN)/report \
	     $$python -m pytest -p no:cacheprovider -k "not triton" $(addprefix $(CURDIR)/,$(UBSAN_TESTS)); status=$$?; \
	  if ls $(CURDIR)/$(UBSAN)/report.* >/dev/null 2>&1; then \
	    grep -h "runtime error" $(CURDIR)/$(UBSAN)/report.* | sort | uniq -c; \
	    echo "make check-ubsan: undefined behavior"; exit 1; fi; \
	  exit $$status

bench: $(READY) $(MODELS)
	$(PY) -m benchmarks.cpu

soak: $(READY)
	$(PY) -m tests.fuzz.soak

prove-files: $(READY)
	$(PY) -m tests.fuzz.kills
	$(PY) -m tests.fuzz.corruptions
	$(PY) -m tests.fuzz.hostile

bench-gpu: $(READY)
	$(PY) -m benchmarks.gpu

clean:
	rm -rf .venv build dist runs *.egg-info revq_kernels/*.so

.venv/.torch:
	python3 -m venv .venv
	.venv/bin/pip install --quiet torch==$(TORCH) "setuptools>=70.1" wheel ninja pybind11
	touch $@

.venv/.ready: .venv/.torch $(SOURCES)
	REVQ_DEV=1 .venv/bin/pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

# The packages whose quantizers revq.patch knows; encodec without torchaudio, which does not load beside a CPU build of torch
INSTALL_MODELS = $(PY) -m pip install --quiet "revq[drop-in]" && $(PY) -m pip install --quiet --no-deps encodec==0.1.1

.venv/.drop-in: .venv/.ready
	$(INSTALL_MODELS)
	touch $@

active-environment-drop-in: active-environment
	$(INSTALL_MODELS)

active-environment:
	@$(PY) -c "import torch; v = tuple(map(int, torch.__version__.split('.')[:2])); assert v >= (2, 10), torch.__version__" \
	  || { echo "make PY=$(PY): this environment needs torch >= 2.10; install the build you want first"; exit 1; }
	$(PY) -m pip install --quiet "setuptools>=70.1" wheel ninja pybind11
	REVQ_DEV=1 $(PY) -m pip install --quiet --no-build-isolation -e ".[dev]"
