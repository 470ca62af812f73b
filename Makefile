# Two commands do all the set-up, each by itself: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEMO := demo
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu lint types bench bench-full clean

help:
	@echo "make demo   install, build a 4k bundle of the demo checkpoint, draw an image"
	@echo "make test   install, lint, type-check, run every test that needs no GPU"
	@echo "make test-slow | test-gpu | lint | types | bench | bench-full | clean"

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; set PYTHON=/path/to/python3.11" >&2; exit 3; }
	$(PYTHON) -m venv .venv
	touch $@

# Native sources and packaging are prerequisites: an editable install compiles them only when it is made.
NATIVE := CMakeLists.txt $(wildcard runtime/csrc/*)

.venv/demo: .venv/python pyproject.toml constraints.txt $(NATIVE)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export,cpu,train]'
	touch $@

.venv/test: .venv/python pyproject.toml constraints.txt $(NATIVE)
	L2P_REQUIRE_NATIVE=$(CI) $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export,cpu,train,dev]'
	touch $@ .venv/demo

demo: .venv/demo
	mkdir -p $(DEMO)
	$(BIN)/l2p-export build --profile 4k --out $(DEMO)/demo-4k.bundle
	$(BIN)/l2p-export generate $(DEMO)/demo-4k.bundle --embeddings $(DEMO)/demo-4k.bundle/reference/padded.*.safetensors \
		--size 1024x1024 --seed 7 --out $(DEMO)/picture.png
	@echo "the picture is $(DEMO)/picture.png"

# A file's tests stay in one process, so that its fixtures are made once; each process computes in one thread.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

test-slow: .venv/test
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/test
	$(BIN)/python -m pytest -m gpu

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test
	$(BIN)/mypy

bench: .venv/test
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/import_memory.py

# Tens of minutes and of gigabytes each; docs/full-size.md and docs/engines.md have what they printed.
bench-full: .venv/test
	$(BIN)/python benchmarks/full_size.py
	$(BIN)/python benchmarks/full_width.py
	$(BIN)/python benchmarks/latent_ratio.py
	$(BIN)/python benchmarks/engines.py profiles
	$(BIN)/python benchmarks/engines.py trunk
	$(BIN)/python benchmarks/engines.py full
	$(BIN)/python benchmarks/engines.py float8

clean:
	rm -rf .venv $(DEMO) build dist
