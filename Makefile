# Every target sets up its own environment in .venv; nothing else is needed than Python 3.11, make and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Short socket paths and own Ray instances: see docs/architecture.md, "Tests".
TEST_ENV := RAY_memory_monitor_refresh_ms=0 RAY_AUTH_MODE=disabled RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.1

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.demo
	$(BIN)/python ray_job.py demo --output demo_output

test: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/python -m flake8 .
	$(BIN)/python -m isort --check-only .
	$(BIN)/python -m mypy

bench: $(VENV)/.bench
	for part in first_stage.py "evaluation.py speed" loader.py memory.py restart.py tokenize.py train.py; do \
		TESSERA_ORACLES=$(VENV)/oracles $(VENV)/bench/bin/python benchmarks/$$part || exit 1; done

# DeepSpeed is a source package whose build imports torch, so it comes last and without build isolation.
$(VENV)/.base: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip wheel "setuptools>=68,<82"
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[demo]"
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation deepspeed==0.19.8
	touch $@

$(VENV)/.demo: $(VENV)/.base
	touch $@

# The original implementations that tests compare with (tests/oracles.py, tests/fidelity_support.py) come without their
# dependencies and off every import path: transformers and torchvision change what other packages import.
$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install --quiet -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/oracles taming-transformers-rom1504==0.0.6 \
		diffusers==0.35.2 huggingface-hub==0.36.0 lpips==0.1.4 torch-fidelity==0.4.0
	rm -rf $(VENV)/oracles/tests  # torch-fidelity packs its tests, which would hide ours
	touch $@

# On top of .venv and not in it: torchmetrics imports transformers wherever it finds it. mosaicml-streaming comes without
# its dependencies: it caps numpy and transformers and wants torchvision and cloud clients.
$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m venv --without-pip $(VENV)/bench
	purelib='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	printf 'import site; site.addsitedir("%s")\n' "$$($(BIN)/python -c "$$purelib")" \
		> "$$($(VENV)/bench/bin/python -c "$$purelib")/tessera.pth"
	$(BIN)/pip --python $(VENV)/bench install --quiet -e ".[bench]"
	$(BIN)/pip --python $(VENV)/bench install --quiet --no-deps mosaicml-streaming==0.13.0
	touch $@

clean:
	rm -rf $(VENV) demo_output
