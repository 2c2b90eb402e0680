# make demo    the whole system on MovieLens-100K with SmolLM2-135M, under ten minutes on two cores
# make test    the tests that need no other packages, except the longest
# make test-more  the tests that install PyTorch (CPU), libtpu and Playwright, start several processes,
#              or take long
# make test-beam  the tests of the Apache Beam path, in an environment of their own (.venv-beam)
# make check   lint and the quick tests, for every commit
# Each makes .venv if need be. Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ELSEWHERE := not long and not torch and not tpu_backend and not multiprocess and not browser
TEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
UNOPTIMIZED := JAX_DISABLE_MOST_OPTIMIZATIONS=1
CONSTRAINTS = constraints/py$(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])').txt
INSTALL = $(BIN)/python -m pip install -qq $(if $(wildcard $(CONSTRAINTS)),-c $(CONSTRAINTS))

.PHONY: demo test test-more test-beam check format clean

demo: $(VENV)/installed
	$(BIN)/python -m palr_jax.main --config=configs/demo.py --workdir=runs/demo

# Most of a test's time is compiling. So LLVM leaves its optimisations out, which changes no result
# beyond rounding (XLA's own passes run), and tests share what they compile. The tests against PyTorch
# and for TPUs compile as users do.
test: $(VENV)/installed
	rm -rf $(VENV)/programs
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/$(VENV)/programs JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1 \
	$(UNOPTIMIZED) $(TEST) -m "$(ELSEWHERE)"

test-more: $(VENV)/installed
	$(INSTALL) -e '.[test,torch,tpu_backend,browser]'
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m "not ($(ELSEWHERE)) and not multiprocess"
	JAX_PLATFORMS=cpu $(UNOPTIMIZED) $(BIN)/python -m pytest -m multiprocess

# Without the constraints: apache-beam wants an older protobuf than everything else here.
test-beam:
	$(PYTHON) -m venv $(VENV)-beam
	$(VENV)-beam/bin/python -m pip install -qq -e '.[test,beam]'
	JAX_PLATFORMS=cpu $(VENV)-beam/bin/python -m pytest tests/data/test_beam.py

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(UNOPTIMIZED) $(TEST) -m "$(ELSEWHERE) and not slow and not real_data"

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Versions are pinned where a constraints file for this Python is at hand.
$(VENV)/installed: setup.py $(wildcard constraints/*.txt)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(INSTALL) -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-beam build *.egg-info .pytest_cache .ruff_cache
