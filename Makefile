# Two commands on a fresh machine: `make demo` and `make test`.  Each rule also works by hand.
#
#   make demo            photos -> tokens -> photos, on the shipped photos and VAE; results in runs/demo/
#   make test            the test suite
#   make check           lint
#   make bench           measure (wants '.[bench]' for the peers); rows go to benchmarks/results/
#   make soak            10^10 pairs: no wrong index
#   make bench-gpu       the same on a CUDA device: correctness first, at most ten minutes
#   make PY=python demo  use the active environment, with the torch that is in it (never replaced)

TORCH ?= 2.13.0
SOURCES := pyproject.toml setup.py $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl)

ifeq ($(origin PY), undefined)
PY := .venv/bin/python
READY := .venv/.ready
MODELS := .venv/.drop-in
else
READY := active-environment
MODELS := active-environment-drop-in
endif

.PHONY: demo test check bench bench-gpu soak clean active-environment active-environment-drop-in

demo: $(READY)
	$(PY) -m revq demo

test: $(READY) $(MODELS)
	$(PY) -m pytest
	TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels -k triton

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(READY) $(MODELS)
	$(PY) -m benchmarks.cpu

soak: $(READY)
	$(PY) -m tests.fuzz.soak

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
