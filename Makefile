# make demo   environment, build, and the whole job on real data
# make test   environment, build, and all tests
# make bench  environment, build, and the benchmarks
#
# Each is enough on a fresh clone with Python >= 3.11 and a C++20 compiler. A second call installs
# and builds nothing that is up to date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CXX_FOUND := $(if $(filter default undefined,$(origin CXX)),c++,$(CXX))
SOURCES := $(shell find csrc -type f)

# Idle threads sleep instead of spinning: where other work shares the cores, spinning makes small
# operators many times slower. Benchmarks keep the default.
demo test: export OMP_WAIT_POLICY ?= passive

.PHONY: demo test bench build environment clean

demo: build
	$(BIN)/neusemslice demo

# Several at once: most tests keep one core busy, and two cores are through in little more than half
# the time.
test: build
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

bench: build
	$(BIN)/python -m bench.class_stats
	$(BIN)/python -m bench.contribution
	$(BIN)/python -m bench.gram
	$(BIN)/python -m bench.masked_optim
	$(BIN)/python -m bench.profiler
	$(BIN)/python -m bench.readapt_step
	$(BIN)/python -m bench.rows
	$(BIN)/python -m bench.similarity
	$(BIN)/python -m bench.slicing

build: $(VENV)/.built

environment: $(VENV)/.installed

clean:
	rm -rf build neusemslice/_C*.so neusemslice/_C_build.json $(VENV)/.built

# Names the first thing that is missing, in one sentence, before anything is installed or compiled.
define preflight
	@command -v $(PYTHON) >/dev/null || { echo "neusemslice needs Python 3.11 or newer, but there is no '$(PYTHON)' here; install it or set PYTHON=."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "neusemslice needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1); set PYTHON= to a newer one."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "neusemslice needs Python's venv module, but '$(PYTHON)' has none; on Debian install python3-venv."; exit 1; }
	@command -v $(CXX_FOUND) >/dev/null || { echo "neusemslice needs a C++20 compiler, but there is no '$(CXX_FOUND)' here; install g++ 11 or newer, or set CXX=."; exit 1; }
	@echo '#include <concepts>' | $(CXX_FOUND) -std=c++20 -fopenmp -fsyntax-only -x c++ - 2>/dev/null || { echo "neusemslice needs a compiler with C++20 and OpenMP, but '$(CXX_FOUND)' cannot compile '#include <concepts>' with -std=c++20 -fopenmp."; exit 1; }
	@echo '#include <Python.h>' | $(CXX_FOUND) -fsyntax-only -x c++ -I"$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')" - 2>/dev/null || { echo "neusemslice needs the header Python.h of '$(PYTHON)', which '$(CXX_FOUND)' does not find; on Debian install python3-dev."; exit 1; }
endef

$(VENV)/.installed: requirements.lock
	$(preflight)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py pyproject.toml $(SOURCES)
	$(preflight)
	CXX=$(CXX_FOUND) $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c 'import torch, neusemslice._C as c; [print(f"neusemslice build: {k} = {v}") for k, v in c.build_info().items()]'
	@touch $@
