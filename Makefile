# The project's commands. Each works first thing after a clone: what it needs, it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CPP := $(wildcard csrc/*.cpp csrc/*.h tools/toolkit.py stat_kernels/schemas.py csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*/*.h)
FORMATTED := $(filter-out %.py,$(CPP)) $(wildcard tests/kernels/cuda_emulator/*.h tests/kernels/cuda_emulator/*.c* examples/cpp/*.cpp)

.PHONY: help venv build test lint format docs demo bench bench-pytest gpu clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(READY)  ## .venv with the project, its training and developing extras, at the tested versions

$(READY): constraints.txt pyproject.toml setup.py $(CPP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt "setuptools>=77,<82" wheel ninja pybind11 torch numpy
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[train,dev,docs,bench,integrations,export]"
	touch $@

build: venv  ## the native library again, after a change of csrc/
	$(BIN)/python setup.py -q build_ext --inplace

test: venv  ## every test, a file at a time on each core
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: venv  ## ruff, clang-format and mypy, no changes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

format: venv  ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

docs: venv  ## the documentation site, into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q -d site

demo: venv  ## video clips, training on them, evaluation, prediction, kernel figures: three to six minutes
	$(BIN)/stat-video make-clips demo/clips --force
	$(BIN)/stat-video train --config clips_tiny --data.root demo/clips --run.dir demo/run --run.resume none
	$(BIN)/stat-video eval --model demo/run
	$(BIN)/stat-video predict $$(ls demo/clips/val/*.mp4 | head -1) --model demo/run
	$(BIN)/python -m benchmarks.attention --cases b64-stage3 --dtypes float32 --rounds 5 --out demo

bench: venv  ## the fused kernels against the strongest peers, about three minutes
	$(BIN)/python -m benchmarks.attention

bench-pytest: venv  ## the same through pytest-benchmark, for its tables and comparisons
	$(BIN)/python -m pytest benchmarks --benchmark-group-by=group

gpu:  ## build, checks and timings on a machine with a GPU, in its own Python; CALL=1 or CALL=2 fits ten minutes
	PYTHONPATH=stat $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $(if $(CALL),--call $(CALL))

clean:  ## what was built, not .venv
	rm -rf build dist demo site *.egg-info stat_kernels/*.so
