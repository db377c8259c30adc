# make demo: scores some of the shipped prompts, then says how well scores of all of them separate memorized ones.
# make test: the tests. make lint: linters, formatters, types. make format: applies the formatters.
# Each creates .venv and installs what it needs, if that is not done yet.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

BUILD_FILES := setup.py pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc -type f)
PACKAGE_FILES := $(shell find sharpcore kernels -name '*.py')
CPP_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h')

MODEL := sharpcore/models/tiny-sd-eps
DEMO_OUTPUT := demo-output
SCORE_OPTIONS := --limit 10 --overwrite
EVALUATE_OPTIONS := --overwrite

.PHONY: demo test lint format clean

# An editable install, if there is one, serves the demo as well.
demo: $(if $(wildcard $(VENV)/editable.stamp),$(VENV)/editable.stamp,$(VENV)/installed.stamp)
	mkdir -p $(DEMO_OUTPUT)
	HF_HUB_OFFLINE=1 $(BIN)/sharpcore score $(MODEL)/prompts_mem.txt -o $(DEMO_OUTPUT)/memorized.parquet $(SCORE_OPTIONS)
	HF_HUB_OFFLINE=1 $(BIN)/sharpcore evaluate --memorized $(MODEL)/prompts_mem.txt \
		--others $(MODEL)/prompts_nonmem.txt --out $(DEMO_OUTPUT) $(EVALUATE_OPTIONS)

# Small tensors gain nothing from threads; two processes of one thread each use the cores better.
test: $(VENV)/editable.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/editable.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(VENV)/editable.stamp
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) build *.egg-info sharpcore/_C*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed.stamp: $(BUILD_FILES) $(PACKAGE_FILES) | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt '.[diffusers]'
	rm -f $(VENV)/editable.stamp
	touch $@

$(VENV)/editable.stamp: $(BUILD_FILES) | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[diffusers,dev]'
	rm -f $(VENV)/installed.stamp
	touch $@
