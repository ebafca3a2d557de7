# Everything rests on .venv, which any target makes from a bare clone and re-uses afterwards.
# `make gpu PYTHON=python3` uses that Python as it is: for a machine without a network that already holds a CUDA torch.

BASE_PYTHON ?= python3
OUT ?= gpu-out
FROM ?= $(OUT)
DEMO_OUT ?= runs/demo

ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
READY := .venv/ready
else
READY := installed
endif

# Where this is set, each of the many processes that tests, demo and benchmarks start compiles the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test quick verify bench gpu gpu-tune gpu-python keep versions lint installed

demo: $(READY)  ## verify the kernels, train the primer's models, write a report with pictures
	$(PYTHON) -m primer_fast.cli demo --out $(DEMO_OUT)

test: $(READY)  ## all tests; without a GPU the kernels run in Triton's interpreter
	$(PYTHON) -m pytest -n auto --maxprocesses 8 --dist loadgroup

quick: $(READY)  ## lint, layout and most tests of one op, in seconds: make quick OP=layer_norm
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pytest -n 2 -m "not slow" tests/test_layout.py tests/functional $(wildcard tests/properties/test_$(OP).py) \
		-k "test_layout.py or $(if $(OP),$(OP),nothing)$(if $(filter linear,$(OP)), and not linear_)"

verify: $(READY)  ## every case of every op, kernel against NumPy
	$(PYTHON) -m primer_fast.cli verify

bench: $(READY)  ## pytest-benchmark's table of the ops
	$(PYTHON) -m pytest bench --benchmark-only

gpu: $(READY)  ## measure on a GPU for six minutes, into $(OUT); ARGS=--rehearse without one, --estimate for the time
	$(PYTHON) -m primer_fast.bench.gpu --out $(OUT) $(ARGS)

gpu-tune: $(READY)  ## search settings for the rows furthest below their targets, four minutes on a GPU, into $(OUT)
	$(PYTHON) -m primer_fast.bench.gpu --only tune --out $(OUT) $(ARGS)

keep: $(READY)  ## check the files of make gpu or gpu-tune in $(FROM) and put them in place, to be committed
	$(PYTHON) -m primer_fast.bench.keep $(FROM) $(ARGS)

gpu-python: $(READY)  ## a Python with what a GPU machine has and no more: make gpu PYTHON=.versions/gpu/bin/python ARGS=--rehearse
	$(PYTHON) -m primer_fast.bench.versions --make gpu

versions: $(READY)  ## the same code under older and newer PyTorch, Triton and NumPy; the table goes to docs/versions.md
	$(PYTHON) -m primer_fast.bench.versions $(ARGS)

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

.venv/ready: setup.py constraints.txt
	test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

installed:  # an editable install into the given Python, without a network and without dependencies
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation -e .
