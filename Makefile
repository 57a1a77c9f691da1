# Every habit is one command, the same for contributors and for CI. The first target makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The oldest Python, as JetPack 6 has it, and with it ONNX Runtime 1.23: looked for in the path, at pyenv and at uv.
OLD := 3.10
OLD_VENV ?= .venv-old
OLD_TESTS ?= tests/artefacts tests/runtime tests/updates tests/server tests/calibrate
OLD_PLACES = "$(OLD_PYTHON)" python$(OLD) $$HOME/.pyenv/versions/$(OLD).*/bin/python "$$(uv python find $(OLD) 2>/dev/null)"
IS_OLD = import sys; sys.exit(sys.version_info[:2] != tuple(map(int, "$(OLD)".split("."))))

# Two processes; the tests of a file stay in one of them, where they share what its fixtures have made. Bytecode is kept,
# whatever the environment says: without it each process rewrites the assertions of all tests anew, 20 seconds long.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist loadfile

# What deploy/ installs, for every Python and machine at once.
LOCK := $(BIN)/uv pip compile --no-config --universal --python-version 3.10 --generate-hashes --no-header --no-annotate -q
LOCK_SAYS = \# Made by 'make lock'. Every file by its hash, for Linux and any Python from 3.10 on: pip install --require-hashes -r

.PHONY: quickstart test test-all test-old check audit lock bench attack clean

quickstart: $(READY)   ## environment, install, then the whole way once on bundled data
	rm -rf quickstart
	$(BIN)/cdl-edge quickstart --out quickstart

test: $(READY)         ## no network, no GPU; three minutes on two cores
	$(PYTEST)

test-all: $(READY)     ## the same and all that is marked slow: whole grids, kills, torchrun
	$(PYTEST) -m ""

test-old:              ## what a device runs, on Python 3.10 with ONNX Runtime 1.23; says so where there is none
	@for python in $(OLD_PLACES); do \
		if "$$python" -c '$(IS_OLD)' 2>/dev/null; then \
			PYTEST_ADDOPTS="$(OLD_TESTS)" $(MAKE) --no-print-directory test PYTHON="$$python" VENV=$(OLD_VENV); exit; \
		fi; \
	done; echo "no Python $(OLD) here: nothing was tested; where there is one: make test-old OLD_PYTHON=/path/to/python$(OLD)"; false

check: $(READY) audit  ## style, types, and known weaknesses of what deploy/ installs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(READY)        ## asks PyPI; where it cannot be asked a line says so
	$(BIN)/python deploy/audit.py

lock: $(READY)         ## newest versions within the ranges of deploy/requirements.txt, with hashes
	$(BIN)/python -m pip install --quiet uv
	$(LOCK) deploy/requirements.txt -o deploy/requirements.lock
	echo "cuda-python>=12.6,<13" | $(LOCK) - -o deploy/cuda12.lock
	echo "cuda-python>=13,<14" | $(LOCK) - -o deploy/cuda13.lock
	for name in requirements cuda12 cuda13; do sed -i "1i $(LOCK_SAYS) $$name.lock" deploy/$$name.lock; done

bench: $(READY)        ## the machine should have nothing else to do
	$(BIN)/python benchmarks/export.py

attack: $(READY)       ## changed files and kills, more than an hour; with fewer: make attack ATTACK="--bundles 500 --trainings 5"
	$(BIN)/python benchmarks/attack.py $(ATTACK)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || (echo "Python 3.10 or newer is needed; try: make PYTHON=python3.11" && false)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(READY)

clean:                 ## everything that make made
	rm -rf $(VENV) $(OLD_VENV) quickstart build *.egg-info .mypy_cache .ruff_cache .pytest_cache
