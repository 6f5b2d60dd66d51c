# The project's verbs, the same for people and for CI. Everything lives in .venv and build/; nothing is global.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup run test lint sanitize quality bench docs wheel clean

PYTHON ?= python3
MODEL ?= smollm2-135m-instruct
PROMPT ?= Why is the sky blue? Answer in three sentences.
TESTS ?= tests
export PROMPT
ifeq ($(origin CXX),default)
CXX := c++
endif
export CXX

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install
# Installed beside the project rather than in an isolated environment, so that a rebuild compiles only what changed.
BUILD_TOOLS := "scikit-build-core>=0.12" "nanobind>=2.9" cmake ninja
CPP := $(wildcard csrc/*.h csrc/*.cpp)

help: ## list these verbs
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

# ---- the virtual environment: a stamp file for each thing installed into it

.venv/.created:
	@.ci/check-tools $(PYTHON)
	@echo "Creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear .venv
	@touch $@

# Editable: an edit in Python counts at once, an edit in C++ when make has run.
.venv/.installed: .venv/.created pyproject.toml CMakeLists.txt $(CPP)
	@.ci/check-tools $(PYTHON)
	@echo "Building and installing llm-boost into .venv"
	@$(PIP) $(BUILD_TOOLS)
	@$(PIP) --no-build-isolation --editable .
	@touch $@

.venv/.extra-%: pyproject.toml | .venv/.installed
	@echo "Installing the $* extra into .venv"
	@$(PIP) "llm-boost[$*]"
	@touch $@

setup: .venv/.installed ## create .venv and install the project into it

# ---- what people do

run: setup ## pull a small model and let it answer; PROMPT="..." asks something else
	@$(BIN)/llm-boost pull $(MODEL) >/dev/null
	@$(BIN)/llm-boost predict --model $(MODEL) --chat -- "$$PROMPT"

test: setup .venv/.extra-test ## run the tests; TESTS="tests/x.py" chooses, LLM_BOOST_ISA=avx2 forces
	@$(BIN)/python -m pytest -n 2 $(TESTS)

lint: setup .venv/.extra-lint ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

# The site hooks of .venv would import the ordinary build, hence -S and the explicit path.
SANITIZED := PYTHONPATH=build/sanitize/site:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))') \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(BIN)/python -S

sanitize: setup .venv/.extra-test ## run the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(BIN)/cmake -S . -B build/sanitize -G Ninja --log-level=ERROR -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_BUILD_TYPE=RelWithDebInfo -DLLM_BOOST_SANITIZE=ON
	@$(BIN)/cmake --build build/sanitize
	@rm -rf build/sanitize/site && mkdir build/sanitize/site && cp -r src/llm_boost build/sanitize/site
	@$(BIN)/cmake --install build/sanitize --prefix build/sanitize/site >/dev/null
	@$(SANITIZED) -c 'from llm_boost import _native; assert "build/sanitize" in _native.__file__, _native.__file__'
	@$(SANITIZED) -m pytest --capture=sys tests/native

quality: setup .venv/.extra-test ## check what each dtype costs a small model, on every instruction set
	@LLM_BOOST_QUALITY_MODEL="$$($(BIN)/llm-boost pull smollm2-135m-instruct)" \
		$(BIN)/python -m pytest -q tests/test_quality.py

bench: setup ## measure a small model beside the machine's limits; ARGS="..." is passed on
	@$(BIN)/llm-boost pull $(MODEL) >/dev/null
	@$(BIN)/llm-boost bench latency --model $(MODEL) $(ARGS)

docs: setup .venv/.extra-test ## check the links inside the documentation
	@$(BIN)/python -m pytest -q tests/test_docs.py

wheel: setup ## build a wheel into dist/, the form in which others install the project
	@$(BIN)/python -m pip --disable-pip-version-check -qq wheel --no-deps --no-build-isolation -w dist .

clean: ## remove everything that make has made
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
