# Each target makes what it needs: a virtual environment in .venv, the Rust
# extension in python/bitnet_rs. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The extension depends on these; maturin and cargo decide what to compile.
SOURCES := $(shell find rust -name '*.rs') Cargo.toml Cargo.lock pyproject.toml
CORE := python/bitnet_rs/.built

.DEFAULT_GOAL := help
.PHONY: help demo test test-rust test-python test-slow test-aarch64 test-x86-levels test-avx512-emulated soak fuzz test-schemas lint format bench bench-results bench-kernels bench-serving screenshots wheel clean rust

help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 24

demo: $(CORE)  ## Build, then stream text from the bundled model and say how fast
	$(BIN)/bitnet-rs generate --stats --seed 4 --max-tokens 120 "Once upon a time there was"

test: test-rust test-python  ## Both test suites: Rust, then Python

test-rust: rust
	cargo test --locked --quiet
	@# Again with the fast paths off.
	BITNET_RS_ISA=generic cargo test --locked --quiet --lib --tests
	cargo bench --locked --quiet -- --test

test-python: $(CORE)
	@# The outside oracles on the scalar kernels, then everything on the best. Two processes: most
	@# tests keep one core busy, and more would be too many for those that measure threads.
	BITNET_RS_ISA=generic $(BIN)/python -m pytest -q -n 2 tests/test_golden.py -k "not perplexity"
	$(BIN)/python -m pytest -n 2

test-slow: $(CORE)  ## The whole Python suite on each lower instruction set (10 minutes)
	BITNET_RS_ISA=avx2 $(BIN)/python -m pytest -q
	BITNET_RS_ISA=generic $(BIN)/python -m pytest -q --timeout 1200

test-aarch64: rust  ## The Rust tests as aarch64 code, emulated at three levels (needs Debian 12)
	tools/test-aarch64.sh

test-x86-levels: rust  ## The Rust tests on emulated older x86-64 processors (needs Debian 12)
	tools/test-x86-levels.sh

test-avx512-emulated: rust  ## The Rust tests on an emulated PC with AVX-512 (needs Debian 12)
	tools/test-avx512-emulated.sh

soak: $(CORE)  ## A thousand requests from 32 clients, well-behaved and not, on a real server (1 minute)
	$(BIN)/python tests/soak_server.py 1000 32

fuzz: $(CORE)  ## Read 200,000 damaged GGUF and safetensors files: each loads or fails clearly (5 minutes)
	$(BIN)/python tests/fuzz_gguf.py 200000

test-schemas: $(CORE)  ## 200 random JSON schemas through a server: every reply is valid (2 minutes)
	$(BIN)/python tests/check_schemas.py 200

lint: $(CORE)  ## Formatting, clippy, rustdoc, ruff, mypy, stubtest: warnings are errors
	cargo fmt --check
	cargo clippy --locked --quiet --all-targets -- -D warnings
	cargo clippy --locked --quiet --all-targets --features python -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --quiet --no-deps
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest bitnet_rs._core

format:  ## Format all code
	cargo fmt
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

bench: $(CORE)  ## Benchmarks: criterion, then pytest-benchmark
	cargo bench --locked
	$(BIN)/python -m pytest benches --benchmark-only

bench-results: $(CORE)  ## Measure what docs/performance.md quotes (on a quiet machine)
	$(BIN)/python benches/record.py

bench-kernels: $(CORE)  ## Measure the tables of docs/kernels.md (10 minutes, on a quiet machine)
	PYTHONPATH=benches $(BIN)/python benches/record_kernels.py

bench-serving: $(CORE)  ## Measure many streams at once, for docs/server.md (10 minutes, on a quiet machine)
	PYTHONPATH=benches $(BIN)/python benches/record_serving.py

screenshots: $(CORE)  ## Take the pictures of the chat page in docs/images (needs chromium)
	BITNET_RS_SCREENSHOTS=1 $(BIN)/python -m pytest -q tests/test_chat_page.py -k screenshots

wheel: rust $(BIN)/maturin  ## Build a wheel into dist/
	$(BIN)/maturin build --release --locked --out dist

clean:  ## Remove what was built
	rm -rf target $(VENV) dist $(CORE) python/bitnet_rs/*.so

$(CORE): rust $(BIN)/maturin $(SOURCES)
	@# Where a tool outside has another environment active, maturin must use ours.
	env -u CONDA_PREFIX VIRTUAL_ENV=$(CURDIR)/$(VENV) PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
	  $(BIN)/maturin develop --release --locked --quiet
	@touch $@

$(BIN)/maturin: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "bitnet-rs needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "installing Python packages into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade $$($(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(" ".join(chr(34) + d + chr(34) for d in p["dependencies"] + p["optional-dependencies"]["server"] + p["optional-dependencies"]["dev"]))' | tr -d '"')
	@touch $@

rust:
	@command -v cargo >/dev/null || { \
	  echo "bitnet-rs needs a Rust toolchain (1.89 or newer) to build, and there is no cargo here."; \
	  echo "Get one from https://rustup.rs, or on Debian 13 and newer: apt-get install cargo"; exit 1; }
	@command -v cc >/dev/null || { \
	  echo "Rust needs a C linker, and there is no cc here. On Debian: apt-get install gcc"; exit 1; }
