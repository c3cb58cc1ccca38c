# One virtual environment, .venv, for everything; each target installs what it needs into it.
PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo examples test fuzz faults check format docs bench gpu clean

demo: .venv/installed-examples
	.venv/bin/python examples/digits.py

# Every example in its short form, and pictures/index.html. make examples DATA=folder: where the data sets are; what
# needs others is left out.
DATA ?= data
examples: .venv/installed-examples
	.venv/bin/python examples/gallery.py --data $(DATA)

test: .venv/installed-test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

# FUZZ_SECONDS=600 make fuzz: for ten minutes; FUZZ_SEED=...: one round again.
fuzz: .venv/installed-test
	.venv/bin/python -m tests.laws.fuzz

# The long form of tests/faults, and of signals on several ranks: thousands of kills, every bit of every file. An hour;
# as root, small disks and other users too.
faults: .venv/installed-test
	FAULTS=long .venv/bin/python -m pytest tests/faults
	FAULTS=long .venv/bin/python -m pytest tests/loop/ranks/test_two_ranks.py -k signal

check: .venv/installed-lint
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/installed-lint
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# The site, as docs/build/index.html; a warning is an error.
docs: .venv/installed-docs
	.venv/bin/python -m sphinx -W --keep-going -b html docs docs/build

.venv/installed-docs: pyproject.toml .venv/installed-examples
	$(PIP) --editable '.[docs]'
	@touch $@

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed-examples: pyproject.toml | .venv/bin/python
	@echo "installing into .venv (about a minute)"
	$(PIP) --editable '.[examples]'
	@touch $@

# fastai, the peer of the differential tests, is worth having but not worth failing for: its tests skip without it. The
# tests of trainers (pip install '.[trainers]') and of other optimizers ('.[references]') skip too.
.venv/installed-test: pyproject.toml .venv/installed-examples
	$(PIP) --editable '.[test]'
	-$(PIP) --editable '.[differential]'
	@touch $@

.venv/installed-lint: pyproject.toml .venv/installed-examples
	$(PIP) --editable '.[lint]'
	@touch $@

bench: .venv/installed-benchmarks
	for question in optimizer_step build_time memory run_memory overhead whole_step loop_overhead matrices bytes; do \
		.venv/bin/python benchmarks/$$question.py --save-results || exit 1; \
	done
	.venv/bin/python benchmarks/chart.py --save

.venv/installed-benchmarks: pyproject.toml .venv/installed-examples
	$(PIP) --editable '.[benchmarks]'
	@touch $@

# With a GPU: correctness first, then times.
gpu: .venv/installed-test .venv/installed-benchmarks
	.venv/bin/python -m pytest tests/functional_sgd/fusion/triton
	cd benchmarks && ../.venv/bin/python gpu_check.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .hypothesis pictures docs/build docs/generated
