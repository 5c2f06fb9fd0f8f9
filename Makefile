# Every target sets up what it needs: .venv with the versions of requirements.lock, and the extension, built by ninja.
# Variables: PYTHON (interpreter that .venv is made from, and that `make gpu` runs), PYTEST_ARGS, MUTANTS_ARGS, OUT, CALL, PART, GPU_ARGS.
PYTHON ?= python3
BIN := .venv/bin
STABLE_ABI := 0x020b000000000000
CXX_FILES = $$(git ls-files '*.c' '*.cpp' '*.h' '*.cu' '*.cuh')
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh) csrc/cuda/instances.py

.PHONY: help install demo test test-oldest mutants bench lint format check-triton check-cuda gpu wheel lock clean

help:
	@echo "make demo          train a small GPT with pyllm's layers beside torch.nn's"
	@echo "make test          run the tests; PYTEST_ARGS=\"-m ''\" also those marked slow"
	@echo "make test-oldest   run the tests under the oldest PyTorch and Triton that are supported; 5 GB"
	@echo "make mutants       plant faults one by one and count those that tests find; hours"
	@echo "make bench         benchmark every operator against PyTorch, JSON in results/"
	@echo "make install       set up .venv and build the extension"
	@echo "make lint          ruff, clang-format"
	@echo "make check-triton  compile every Triton kernel ahead of time, with two versions of Triton; fail on spills"
	@echo "make check-cuda    compile every CUDA kernel for every architecture; fail on spills"
	@echo "make wheel         build a wheel into dist/"
	@echo "make gpu OUT=dir   on a machine with a GPU: check, tests, races, sanitizer, benchmarks against peers"

install: .venv/built

.venv/installed: requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

# An order is carried out, whatever was built before.
.PHONY: $(if $(PYLLM_CUDA),.venv/built)
.venv/built: .venv/installed setup.py pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

demo: install
	$(BIN)/python examples/train_gpt.py $(DEMO_ARGS)

test: install
	$(BIN)/python -m pytest -n 2 -m "not slow" $(PYTEST_ARGS)

# The oldest PyTorch and Triton that pyllm supports, in an environment of their own (5 GB with CUDA's parts): its headers
# take the C++, and the library that is built here, of a newer PyTorch, passes the tests there. Triton 3.6's interpreter
# wants an older NumPy.
OLDEST := build/oldest
BINDINGS := $(filter-out %_kernel.cpp,$(wildcard csrc/library.cpp csrc/cpu/*.cpp))
$(OLDEST)/installed: requirements.lock
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.11.0 triton==3.6.0 'numpy<2.4'
	grep --invert-match --extended-regexp '^(torch|triton|setuptools|numpy)==' requirements.lock > $(OLDEST)/rest.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(OLDEST)/rest.txt
	@touch $@

test-oldest: install $(OLDEST)/installed
	headers=$$($(OLDEST)/bin/python -c "import torch, os; print(os.path.dirname(torch.__file__))")/include; \
	for file in $(BINDINGS); do \
	  $(CXX) -std=c++20 -fsyntax-only -w -DTORCH_TARGET_VERSION=$(STABLE_ABI) -Icsrc -isystem $$headers $$file || exit 1; \
	done
	rm -rf $(OLDEST)/site
	$(BIN)/python setup.py --quiet build_py --build-lib $(OLDEST)/site
	cp pyllm/*.so $(OLDEST)/site/pyllm/
	cd $(OLDEST)/site && ../bin/python -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -n 2 -m "not slow" \
	  $(PYTEST_ARGS) $(CURDIR)/tests

mutants: install
	$(BIN)/python tools/mutants.py $(MUTANTS_ARGS)

bench: install
	@mkdir -p results
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-json=results/bench.json

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# PyTorch 2.11, the oldest that the library serves, brings Triton 3.6.
OTHER_TRITON := 3.6.0
build/triton-$(OTHER_TRITON): | .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$(OTHER_TRITON)

# TRITON_ARGS: in place of all variants for all targets; then no table is written.
check-triton: install build/triton-$(OTHER_TRITON)
	$(BIN)/python -m pyllm.kernels.aot $(or $(TRITON_ARGS),--out docs/triton.md)
	PYTHONPATH=$(CURDIR)/build/triton-$(OTHER_TRITON) $(BIN)/python -m pyllm.kernels.aot \
	  $(or $(TRITON_ARGS),--targets sm_90 --out docs/triton.md --append)

check-cuda: install
	$(BIN)/python csrc/cuda/check.py --out docs/cuda.md

wheel: install
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

lock:
	$(PYTHON) -m pip install --quiet uv
	$(PYTHON) -m uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate \
	  $(patsubst %,--no-emit-package %,$(CUDA_PARTS)) requirements.in --output-file requirements.lock

# PyTorch's own metadata pins these, where its build needs them at all.
CUDA_PARTS := cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
  nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
  nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx

clean:
	rm -rf build dist results .pytest_cache pyllm/*.so

# Without .venv and without network: PYTHON has PyTorch, Triton and what pyproject.toml lists for builds and tests; what
# it lacks may lie in .whl/. A build that was carried here, pyllm/*.so, is taken as it is. PART: one or more parts; CALL:
# those of a short run. benchmarks/gpu.py does all of it, also where there is no make.
OUT ?= results/gpu
gpu:
	$(PYTHON) benchmarks/gpu.py --out $(OUT) $(addprefix --call ,$(CALL)) $(addprefix --part ,$(PART)) $(GPU_ARGS)
