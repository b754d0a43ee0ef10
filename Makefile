PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SGLANG_VENV ?= $(CURDIR)/.venv-sglang
SGLANG_CPU := tests/support/sglang_cpu
RECIPE := examples/smollm2_chain_sum
ARGS ?=
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --durations 25
TIMES ?= 20
MEGATRON := $(shell sed -n 's/^megatron = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')

export OMP_WAIT_POLICY := PASSIVE

.PHONY: run browser sglang test test-engines test-all test-gpu conformance fuzz chaos soak same lint protos clean

# Train a real model on this machine; ARGS adds flags, e.g. make run ARGS="--num-rollout 5".
run: $(VENV)/.run
	$(BIN)/python -m examples.smollm2_chain_sum.prepare
	$(BIN)/python train.py --config $(RECIPE)/config.yaml $(ARGS)

# JOBS test processes share the cores; the tests of a file stay together, and share what they start.
test: $(VENV)/.dev browser
	$(PYTEST) -m "not engine and not gpu and not chaos and not slow and not conformance"

# Chromium for the tests of the web page, installed where it is missing and can be.
browser:
	sh tools/get_chromium.sh

# SGLang's environment for the tests of engines, which install it, too.
sglang: $(SGLANG_VENV)/.ready

# Tests of the engines themselves: inference against plain forward passes, training over several ranks, SGLang's server.
test-engines: $(VENV)/.megatron $(SGLANG_VENV)/.ready
	MILES_TEST_SGLANG=$(SGLANG_VENV)/bin/python $(PYTEST) -m "engine and not slow"

# Those two and what they leave out, because it takes long and rarely breaks: all of conformance, 46 more parallel layouts
# of Megatron-Core and 7 more to go on in, checkpoints of it that other optimizers read or that a kill interrupts; SGLang's
# servers with weights of two ranks; whole runs with a critic, with a reward that is no number, with broken data, of a
# launch script with experts, without routing replay, that go on in other number types, whose services are killed at
# random, whose restarted engine has another model, whose draft keeps up from the start, and with a step that is
# abandoned or hangs when Ctrl-C comes.
test-all: $(VENV)/.megatron $(SGLANG_VENV)/.ready browser
	MILES_TEST_SGLANG=$(SGLANG_VENV)/bin/python $(PYTEST) -m "not gpu and not chaos"

# Each trainer with each engine, family of models and transport of weights: that engines hold the trainer's bytes and give
# its answers. test-engines has a diagonal of them, test-all all. ARGS selects, e.g. make conformance ARGS="-k GLM".
conformance: $(VENV)/.megatron $(SGLANG_VENV)/.ready
	MILES_TEST_SGLANG=$(SGLANG_VENV)/bin/python $(BIN)/python -m pytest -m conformance --durations 25 $(ARGS)

# Tests that need a GPU, in an environment that has SGLang, Megatron-Core and TransformerEngine (docs/megatron.md), e.g.
# make test-gpu BIN=/opt/venv/bin. One after the other: they share the GPU. What needs two GPUs skips itself on one.
test-gpu:
	$(BIN)/python -m pytest --durations 25 -m gpu tests/gpu $(ARGS)

# Property tests with new random examples, 20 times (TIMES) as many as elsewhere. What fails is kept in
# tests/found_examples, and every later run of the tests replays it.
# ARGS selects, e.g. make fuzz ARGS="-k packing" TIMES=100.
fuzz: $(VENV)/.dev
	MILES_FUZZ=$(TIMES) $(BIN)/python -m pytest -m hypothesis --timeout 3600 $(ARGS)

# Kills services of running jobs: each alone, all at once, and by 100 random schedules; freezes rollouts and has some
# join and leave. Prints how long each service took to come back. Takes about an hour on two cores. SEEDS runs some of
# the schedules alone, e.g. make chaos SEEDS=86-99.
chaos: $(VENV)/.dev
	$(if $(SEEDS),MILES_CHAOS_SEEDS=$(SEEDS)) $(BIN)/python -m pytest -m chaos $(if $(SEEDS),tests/chaos/test_random_schedules.py)

# Jobs at random over REST on one `miles serve`, paused, stopped, resumed, cancelled and broken on purpose, while processes
# are killed and frozen; ends after MINUTES with a table of what the services used. SEED chooses the schedule, DIR keeps
# everything that is needed to understand a failure, e.g. make soak MINUTES=30 SEED=7 DIR=/data/soak. make chaos has 10
# minutes of it.
MINUTES ?= 120
SEED ?= 1
soak: $(VENV)/.dev
	MILES_SOAK_MINUTES=$(MINUTES) MILES_SOAK_SEED=$(SEED) $(if $(DIR),MILES_SOAK_DIR=$(DIR)) \
	$(BIN)/python -m pytest -m chaos -s tests/chaos/test_soak.py

# Proves that what changed since BEFORE changes no bit of four short runs with fixed seeds: their metrics, samples and
# final weights. E.g. make same BEFORE=main, before and after files were moved; takes about seven minutes on two cores.
same: $(VENV)/.megatron
	$(BIN)/python tools/same_runs.py --before $(or $(BEFORE),$(error BEFORE names the revision to compare with))

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/gen_protos.py --check
	$(BIN)/miles config docs --check --out docs/configuration.md
	$(BIN)/miles config docs --check --page flags --out docs/flags.md

protos: $(VENV)/.dev
	$(BIN)/python tools/gen_protos.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# PIP_FLAGS passes options to pip, e.g. an index that has CPU builds of PyTorch.
$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[all,examples]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[all,examples,dev]'
	touch $(VENV)/.run $@

# SGLang for machines without a GPU, apart from the rest: about 2 GB.
$(SGLANG_VENV)/.ready: $(SGLANG_CPU)/requirements.txt $(SGLANG_CPU)/requirements-no-deps.txt
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/pip install --quiet $(PIP_FLAGS) --requirement $(SGLANG_CPU)/requirements.txt
	$(SGLANG_VENV)/bin/pip install --quiet $(PIP_FLAGS) --no-deps --requirement $(SGLANG_CPU)/requirements-no-deps.txt
	touch $@

# The two packages ask for far more than training needs, and for a newer Python; see docs/megatron.md.
$(VENV)/.megatron: $(VENV)/.dev
	$(BIN)/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[trainer-megatron]'
	$(BIN)/pip install --quiet $(PIP_FLAGS) --no-deps --ignore-requires-python $(MEGATRON)
	touch $@

clean:
	rm -rf $(VENV) $(SGLANG_VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
