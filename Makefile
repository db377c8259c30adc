# make demo: scores some of the shipped prompts, then says how well scores of all of them separate memorized ones.
# make test: the tests. make lint: linters, formatters, types. make format: applies the formatters.
# make test-asan: the tests of the kernels with the address and undefined-behaviour sanitizers of GCC.
# make test-tsan: kernels and worker pool, without Python, with the thread sanitizer.
# Each creates .venv and installs what it needs, if that is not done yet.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

BUILD_FILES := setup.py pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc -type f)
PACKAGE_FILES := $(shell find sharpcore kernels -name '*.py')
NATIVE_FILES := $(shell find tests/native -type f)
CPP_FILES := $(shell find csrc tests/native -name '*.cpp' -o -name '*.cu' -o -name '*.h')

MODEL := sharpcore/models/tiny-sd-eps
DEMO_OUTPUT := demo-output
SCORE_OPTIONS := --limit 10 --overwrite
EVALUATE_OPTIONS := --overwrite

ASAN := build/asan
TSAN := build/tsan
ASAN_TESTS := $(wildcard tests/test_*_tangent.py) tests/test_attention_masks.py tests/test_attention_storage.py \
	tests/test_group_norm_silu_forward.py tests/test_group_norm_silu_storage.py tests/test_geglu_fusion.py \
	tests/test_residual_add.py tests/test_scale_shift_norm.py tests/test_grow_basis.py tests/test_philox.py \
	tests/test_flushed_denormals.py tests/test_stress.py tests/test_precision.py tests/test_memory_budget.py \
	tests/test_plan.py tests/test_backends.py tests/test_sanitizers.py \
	'tests/test_networks.py::test_products_are_exact[sd1-auto]'

.PHONY: demo test test-asan test-tsan lint format clean

# An editable install, if there is one, serves the demo as well.
demo: $(if $(wildcard $(VENV)/editable.stamp),$(VENV)/editable.stamp,$(VENV)/installed.stamp)
	mkdir -p $(DEMO_OUTPUT)
	HF_HUB_OFFLINE=1 $(BIN)/sharpcore score $(MODEL)/prompts_mem.txt -o $(DEMO_OUTPUT)/memorized.parquet $(SCORE_OPTIONS)
	HF_HUB_OFFLINE=1 $(BIN)/sharpcore evaluate --memorized $(MODEL)/prompts_mem.txt \
		--others $(MODEL)/prompts_nonmem.txt --out $(DEMO_OUTPUT) $(EVALUATE_OPTIONS)

# Small tensors gain nothing from threads; two processes of one thread each use the cores better.
test: $(VENV)/editable.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# The package without its usual extension, by links, beside the sanitized one; found first as the working directory.
# CPython and PyTorch leak on purpose. A preloaded libasan finds __cxa_throw only where libstdc++ is loaded as well.
test-asan: $(VENV)/editable.stamp $(ASAN)/built.stamp
	cd $(ASAN)/cmake && $(abspath $(BIN))/ctest --output-on-failure
	ln -sfn $(abspath $(filter-out sharpcore/_C%,$(wildcard sharpcore/*))) $(ASAN)/sharpcore
	cd $(ASAN) && OMP_NUM_THREADS=1 SHARPCORE_SANITIZE=address,undefined \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		LD_PRELOAD="$$(ldd sharpcore/_C*.so | awk '/libasan|libstdc/ {print $$3}' | tr '\n' ' ')" \
		$(abspath $(BIN))/python -m pytest -p no:cacheprovider $(ASAN_TESTS:%=../../%) $(PYTEST_ARGS)

$(ASAN)/built.stamp: $(BUILD_FILES) $(NATIVE_FILES) | $(VENV)/editable.stamp
	rm -rf $(ASAN)
	SHARPCORE_SANITIZE=address,undefined SHARPCORE_NATIVE_TESTS=1 SHARPCORE_REQUIRE_EXTENSION=1 \
		$(BIN)/python setup.py build_ext --build-lib $(ASAN) --build-temp $(ASAN)/cmake
	touch $@

# Where the kernel randomizes addresses more than the sanitizer of older compilers bears, setarch -R turns that off.
test-tsan: | $(BIN)/ctest
	$(BIN)/cmake -S . -B $(TSAN) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
		-DSHARPCORE_SANITIZE=thread -DSHARPCORE_MODULE=OFF -DSHARPCORE_NATIVE_TESTS=ON
	$(BIN)/cmake --build $(TSAN)
	cd $(TSAN) && $$(setarch -R true 2>/dev/null && echo setarch -R) $(abspath $(BIN))/ctest --output-on-failure

$(BIN)/ctest: | $(BIN)/python
	$(BIN)/python -m pip install cmake ninja

lint: $(VENV)/editable.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(VENV)/editable.stamp
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) build *.egg-info sharpcore/_C*.so sharpcore/_cuda*.so

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
