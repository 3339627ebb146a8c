# SPDX-License-Identifier: Apache-2.0
# make run    install what is missing, build, and turn a real dense model into an MSA model that answers (out/report.html)
# make test   every test, sanitizers and fuzzers included
# make help   the rest
#
# DATA=path    text for training and evaluation (file or folder); default: the text that comes with a Debian machine
# OUT=dir      where the main job keeps its results (default out)

JOBS ?= $(shell nproc)
OUT ?= out
PYTHON := .venv/bin/python
JOB := $(PYTHON) tools/main_job.py --out $(OUT) $(if $(DATA),--data $(DATA))

.DEFAULT_GOAL := help
.PHONY: help deps build run test quick bench lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

deps:  ## install Debian packages and the Python environment (skips what is there)
	@tools/install_deps.sh

build: deps  ## build the library, the torch operators and the program into build/
	@cmake --preset release -Wno-dev > build.log 2>&1 || { cat build.log; exit 1; }
	@cmake --build build -j $(JOBS)
	@$(PYTHON) tools/link_python.py

run: build  ## the main job: SmolLM2 becomes an MSA model and is measured
	@$(JOB)

test: build  ## all tests; ends with "N passed, N failed"
	@$(PYTHON) tools/run_tests.py

quick: build  ## unit and Python tests only
	@$(PYTHON) tools/run_tests.py --suite unit --suite python

bench: build  ## speed of every operator against torch on this machine
	@build/bin/msa bench

lint: deps  ## formatting and static analysis
	@clang-format --dry-run -Werror $$(git ls-files '*.cc' '*.h' '*.cpp')
	@cmake --preset dev > /dev/null && clang-tidy --quiet -p build-dev $$(git ls-files 'src/core/*.cc' 'src/ops/*.cc')

format:  ## format the C++ sources
	@clang-format -i $$(git ls-files '*.cc' '*.h')

clean:  ## remove what was built (not .venv, not out)
	@rm -rf build build-* build.log
