# `make demo` shows what this does, `make test` that it works. Each command makes .venv when there is none.
PYTHON ?= python3
BIN := .venv/bin
# Threads of a BLAS that wait for each other on a busy machine cost more than they give in small tests.
TEST_ENV := OPENBLAS_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: demo test lint chaos bench real clean

demo: .venv/ready
	$(BIN)/python -m recipes.align_qwen3

test: .venv/ready
	$(TEST_ENV) $(BIN)/python -m pytest

chaos: .venv/ready
	$(BIN)/python tools/chaos.py --kills 5
	$(BIN)/python tools/chaos.py --kills 5 --while-saving
	$(BIN)/python tools/chaos.py --kills 50 --tiny

bench: .venv/ready
	$(BIN)/python tools/benchmark_overhead.py

# FLAGS="--preset flickr30k-lora --batch-size 12", for example.
real: .venv/ready
	$(BIN)/python -m tools.run_real $(FLAGS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .mypy_cache runs
