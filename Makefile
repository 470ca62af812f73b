# Two commands do all the set-up, each by itself: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEMO := demo
PROMPT := a red circle to the left of a blue square
TEST_PROCESSES ?= 2

# For what loads ONNX Runtime by itself: tests, and the tools that `bench-peers` compares with.
export ORT_DISABLE_TELEMETRY ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-8k demo-weights wheel test test-fast test-newest test-slow test-gpu lint types bench bench-full bench-peers clean

help:
	@echo "make demo   install, build a 4k bundle of the demo model, draw two pictures and judge them"
	@echo "make demo-8k  the same bundle, one picture of 8192x8192 within 6 GiB, in a minute and a half"
	@echo "make test   install, lint, type-check, run every test that needs no GPU"
	@echo "make test-fast  the tests that build no bundle and trace no network: under a minute"
	@echo "make test-newest  the tests of 'make test' with the newest version of every dependency"
	@echo "make wheel  write dist/l2p_export-*.whl, which pip installs on another machine, with extras"
	@echo "make demo-weights | test-slow | test-gpu | lint | types | bench | bench-full | bench-peers | clean"

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

wheel: .venv/python
	mkdir -p dist
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/l2p_export-*.whl

demo: .venv/demo
	mkdir -p $(DEMO)
	$(BIN)/l2p-export build --profile 4k --jobs 2 --out $(DEMO)/demo-4k.bundle
	$(BIN)/l2p-export generate $(DEMO)/demo-4k.bundle --prompt "$(PROMPT)" --size 1024x1024 --seed 7 --out $(DEMO)/picture.png
	$(BIN)/l2p-export judge $(DEMO)/picture.png --prompt "$(PROMPT)"
	$(BIN)/l2p-export generate $(DEMO)/demo-4k.bundle --prompt "$(PROMPT)" --size 4096x4096 --coarse 1024x1024 --seed 7 \
		--out $(DEMO)/picture-4096.png
	$(BIN)/l2p-export judge $(DEMO)/picture-4096.png --prompt "$(PROMPT)"
	@echo "the pictures are $(DEMO)/picture.png and $(DEMO)/picture-4096.png"

demo-8k: .venv/demo
	mkdir -p $(DEMO)
	$(BIN)/l2p-export build --profile 4k --jobs 2 --out $(DEMO)/demo-4k.bundle
	$(BIN)/l2p-export generate $(DEMO)/demo-4k.bundle --prompt "$(PROMPT)" --size 8192x8192 --coarse 1024x1024 \
		--fine-steps 2 --memory-budget 6GiB --seed 7 --out $(DEMO)/picture-8192.png
	$(BIN)/l2p-export judge $(DEMO)/picture-8192.png --prompt "$(PROMPT)"

# The commands that the demo's weights come from, in order; each goes on where it was stopped. Half an hour where there is a
# GPU, more than a week on one core: the card beside the weights says what was spent and what they reached.
WEIGHTS := build/demo-weights
SIZES := --size-px 128 --size-px 128 --size-px 256 --size-px 256 --size-px 512 --size-px 1024
TRANSFER = $(BIN)/l2p-export train transfer $(WEIGHTS)/source --noise fresh --head-divisor 4 --learning-rate 1e-3 \
	--warmup-steps 30 --ema 0.998 --guidance 2 --licence Apache-2.0

demo-weights: $(WEIGHTS)/source/model_index.json
	$(BIN)/l2p-export train corpus $(WEIGHTS)/source --count 4096 --steps 20 --batch 512 --judged --seed 300000 \
		--out $(WEIGHTS)/drawn-128
	$(TRANSFER) --variant 1k --corpus $(WEIGHTS)/drawn-128 --size-px 128 --steps 1000 --batch 256 --sampling-steps 20 \
		--out $(WEIGHTS)/demo-1k.safetensors
	$(TRANSFER) --variant 4k --count 40000 --size-px 1024 --steps 5000 --batch 48 --shift 24 --sampling-steps 12 \
		--init $(WEIGHTS)/demo-1k.safetensors --out $(WEIGHTS)/demo-4k.safetensors

$(WEIGHTS)/first/model_index.json: .venv/demo
	$(BIN)/l2p-export train source --steps 7400 --out $(WEIGHTS)/first

$(WEIGHTS)/source/model_index.json: $(WEIGHTS)/first/model_index.json
	$(BIN)/l2p-export train source --init $(WEIGHTS)/first --scenes 40000 $(SIZES) --steps 3300 --batch 512 \
		--out $(WEIGHTS)/source

# What traces no network.
FAST := tests/unit/runtime tests/unit/calib tests/unit/engines $(addprefix tests/contract/test_,$(addsuffix .py, \
	imports plan_cli judge_cli skips triton_page turns))

# A file's tests stay in one process, so that its fixtures are made once; each process computes in one thread. Files are given
# out in order, those of `unit` last, which are short: the default is by number of tests, and leaves the longest for the end.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-fast: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not bundle" $(FAST)

# What a user gets who installs today; `constraints.txt` has what `make test` runs with. The versions stay in a file.
NEWEST := build/newest

test-newest: .venv/python
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check --upgrade -e '.[export,cpu,train,dev]'
	$(NEWEST)/bin/pip freeze --exclude-editable > $(NEWEST)/versions.txt
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

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
	$(BIN)/python benchmarks/kernels.py
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

# Other tools beside ours, each in an environment of its own. modelopt's extra `onnx` wants onnxruntime-gpu, which nothing
# here can run, and leaves out `requests`; this is the rest of it, with the same version of onnxruntime for the CPU.
PEERS := build/peers
PEER = PYTHONPATH=export:runtime:calib:engines
PIP_PEER = pip install --quiet --disable-pip-version-check --no-compile torch==2.13.0 numpy==2.4.6

bench-peers: .venv/demo $(PEERS)/modelopt/made $(PEERS)/torchao/made
	$(BIN)/python benchmarks/peers/prepare.py $(PEERS)/work
	$(PEER) $(PEERS)/modelopt/bin/python benchmarks/peers/modelopt_peer.py $(PEERS)/work
	$(PEER) $(PEERS)/torchao/bin/python benchmarks/peers/torchao_peer.py $(PEERS)/work
	$(BIN)/python benchmarks/peers/compare.py $(PEERS)/work

$(PEERS)/modelopt/made: .venv/python
	$(BIN)/python -m venv $(PEERS)/modelopt
	$(PEERS)/modelopt/bin/$(PIP_PEER) nvidia-modelopt==0.47.0 onnx==1.21.0 onnxruntime==1.24.4 \
		onnx-graphsurgeon==0.6.1 onnxconverter-common==1.16.0 onnxslim==0.1.98 onnxscript==0.7.2 polygraphy==0.53.6 \
		ml_dtypes==0.6.0 lief==1.0.0 cppimport==26.4.17 requests==2.34.2 huggingface_hub==2.4.0
	touch $@

$(PEERS)/torchao/made: .venv/python
	$(BIN)/python -m venv $(PEERS)/torchao
	$(PEERS)/torchao/bin/$(PIP_PEER) torchao==0.18.0
	touch $@

clean:
	rm -rf .venv $(DEMO) build dist
