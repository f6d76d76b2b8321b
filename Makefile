# `make demo`, `make demo-fsdp` and `make test` work on a fresh machine; everything happens in .venv.
PYTHON ?= python3
BUILT_WITH := torch==2.13.0
TORCH ?= $(BUILT_WITH)
VENV := .venv
PY := $(VENV)/bin/python
# What wheels are built with: CUDA kernels (ON, OFF, or AUTO: where there is an nvcc), for GPU architectures such as 90 or
# "80;90" (all, if empty).
BNBOPS_CUDA ?= AUTO
CUDA_ARCHITECTURES ?=
WHEEL = CUDAARCHS="$(CUDA_ARCHITECTURES)" SKBUILD_CMAKE_DEFINE=BNBOPS_CUDA=$(BNBOPS_CUDA)
# For test-cuda-link: a torch with CUDA.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV := .venv-cuda
# For test-torch: .venv-torch-2.11.0 of TORCH=torch==2.11.0.
TORCH_VENV := .venv-$(subst ==,-,$(TORCH))
# For bench-hf: what bnbops is compared with, which it would stand in for if it were in the same environment.
BITSANDBYTES_VENV := .venv-bitsandbytes
SOURCES := pyproject.toml bnbops/codebooks.py $(shell find csrc -type f)

.PHONY: demo demo-fsdp test test-torch test-planted test-cuda-sanitize test-cuda-link test-gpu gpu-bundle lint bench \
  bench-hf wheels release-check clean always

demo: $(VENV)/installed
	$(PY) examples/train_gpt.py --out demo-out

# Sharded training: 2 processes, whose checkpoint 4 and 1 continue. Fails if their losses differ.
demo-fsdp: $(VENV)/installed
	$(PY) examples/demo_fsdp.py --out demo-out/fsdp

# Two workers keep two cores busy: threads of theirs that wait must not spin.
test: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist worksteal

# make test-torch TORCH=torch==2.11.0: the wheel, which is the same for every torch, in an environment with that one. The
# tests run in their own folder, from where Python does not find the source tree.
test-torch:
	$(MAKE) build/wheels/cpu TORCH=$(BUILT_WITH)
	$(PYTHON) -m venv $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --quiet "$(TORCH)" "$$(ls build/wheels/cpu/*.whl)[test]"
	$(TORCH_VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall build/wheels/cpu/*.whl
	cd tests && OMP_WAIT_POLICY=passive ../$(TORCH_VENV)/bin/python -m pytest -m every_torch --backends cpu \
	  -n 2 --dist worksteal

# Whether the tests notice faults that are planted into a copy of the repository, one after another (tests/planted). It
# compiles for most of an hour. FAULTS="rules checks" takes those whose names or files have one of these words.
test-planted: $(VENV)/installed
	PYTHONPATH=tests $(PY) -m planted $(if $(FAULTS),--only $(FAULTS))

# The CUDA kernels in the simulator, watched for accesses out of bounds and for data races. EVERY=8 is a reduced sweep.
KERNEL_TESTS := $(patsubst %,tests/cuda/test_cuda_%.py,blockwise int8 linear_4bit optimizer weight_4bit)
EVERY ?= 1

test-cuda-sanitize: test-cuda-sanitize-address test-cuda-sanitize-thread

test-cuda-sanitize-%: $(VENV)/installed
	PYTHONPATH=tests $(PY) -m cuda_on_cpu.sanitize $* -- -q --every $(EVERY) $(KERNEL_TESTS)

# No GPU needed: the CUDA library as it ships loads under a torch with CUDA, has every kernel, and refuses bad calls.
# It is built against $(TORCH), as any wheel is.
test-cuda-link: build/wheels/cuda $(CUDA_VENV)/torch
	$(CUDA_VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall build/wheels/cuda/*.whl
	$(CUDA_VENV)/bin/pytest tests/cuda_link

# The tests that run on any kernels, on those of a GPU. Without one each of them is skipped, and says so.
test-gpu: $(VENV)/installed
	$(PY) -m pytest --backends cuda

# A wheel of the working tree for this machine, without and with CUDA kernels. Its objects stay, so that the next one takes
# seconds; in a folder for each choice of architectures, since CMake keeps to its first one.
build/wheels/cpu: BNBOPS_CUDA = OFF
build/wheels/cuda: BNBOPS_CUDA = ON
build/wheels/%: $(VENV)/torch always
	rm -rf $@
	$(WHEEL) SKBUILD_BUILD_DIR="build/objects/$*$(addprefix -,$(subst ;,-,$(CUDA_ARCHITECTURES)))" \
	  $(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir $@ .

# dist/: what is committed as an sdist, and the wheel for all systems that is built from it, from nothing; checked.
wheels: $(VENV)/release
	$(WHEEL) PYTHONPATH=tools $(PY) -m release.check --wheels --torch "$(TORCH)"

# dist/ with all that is published, if nothing is wrong with it (docs/releasing.md).
release-check: $(VENV)/release
	$(WHEEL) PYTHONPATH=tools $(PY) -m release.check --torch "$(TORCH)"

# A folder, and an archive of it, that prove all of this on a machine with a GPU, torch and no network: its run.sh writes a
# report (docs/cuda.md). Its kernels are for an H100 or H200, unless CUDA_ARCHITECTURES says otherwise.
gpu-bundle: CUDA_ARCHITECTURES := $(or $(CUDA_ARCHITECTURES),90)
gpu-bundle: build/wheels/cuda $(VENV)/installed
	PYTHONPATH=tests $(PY) -m gpu_bundle.make --wheel build/wheels/cuda/*.whl --out build/gpu-bundle

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc examples tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

bench: $(VENV)/installed
	$(PY) benchmarks/optim_step.py
	$(PY) benchmarks/quantize.py
	$(PY) benchmarks/linear.py

# Models of Transformers with bnbops and with bitsandbytes; writes docs/huggingface_numbers.md. ARGS=--quick is a trial.
ARGS ?= --write
bench-hf: $(VENV)/installed $(BITSANDBYTES_VENV)/installed
	$(PY) benchmarks/huggingface.py --bitsandbytes $(BITSANDBYTES_VENV)/bin/python $(ARGS)

$(BITSANDBYTES_VENV)/installed:
	$(PYTHON) -m venv $(BITSANDBYTES_VENV)
	$(BITSANDBYTES_VENV)/bin/python -m pip install --quiet "$(TORCH)" bitsandbytes==0.50.2 \
	  "transformers>=5.23,<6" "peft>=0.21,<0.22" "accelerate>=1.15,<2"
	touch $@

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$(TORCH)" numpy
	$(PY) -m pip install --quiet "scikit-build-core>=0.11" "cmake>=3.25" ninja
	touch $@

$(VENV)/release: $(VENV)/torch pyproject.toml
	PYTHONPATH=tools $(PY) -c "import release; print(*release.project()['project']['optional-dependencies']['release'], sep='\n')" | \
	  $(PY) -m pip install --quiet -r /dev/stdin
	touch $@

$(CUDA_VENV)/torch:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet "$(CUDA_TORCH)" numpy safetensors pytest
	touch $@

# Editable: Python changes are live, C++ changes rebuild here. CUDA kernels are built for the GPU of this machine, if any.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	if $(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then export CUDAARCHS=native; else export SKBUILD_CMAKE_DEFINE=BNBOPS_CUDA=OFF; fi; \
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) $(CUDA_VENV) .venv-torch-* $(BITSANDBYTES_VENV) build dist demo-out
