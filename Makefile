# `make demo` and `make test` work on a fresh machine; everything happens in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := pyproject.toml bnbops/codebooks.py $(shell find csrc -type f)

.PHONY: demo test test-cuda-sanitize lint bench clean

demo: $(VENV)/installed
	$(PY) examples/train_gpt.py --out demo-out

# Two workers keep two cores busy.
test: $(VENV)/installed
	$(PY) -m pytest -n 2 --dist worksteal

# The CUDA kernels in the simulator, watched for accesses out of bounds and for data races.
test-cuda-sanitize: $(VENV)/installed
	PYTHONPATH=tests $(PY) -m cuda_on_cpu.sanitize address -- --backends cuda_on_cpu -k cuda_on_cpu
	PYTHONPATH=tests $(PY) -m cuda_on_cpu.sanitize thread -- --backends cuda_on_cpu -k cuda_on_cpu

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc examples tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

bench: $(VENV)/installed
	$(PY) benchmarks/optim_step.py
	$(PY) benchmarks/quantize.py
	$(PY) benchmarks/linear.py

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$(TORCH)" numpy
	$(PY) -m pip install --quiet "scikit-build-core>=0.11" "cmake>=3.25" ninja
	touch $@

# Editable: Python changes are live, C++ changes rebuild here.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo-out
