# make demo, make test, make test-slow, make bench: each installs what it needs, into the active virtual environment or
# into .venv. To take another torch, name it: make test TORCH="torch==2.12.0 torchvision==0.27.0"

PYTHON ?= python3
TORCH ?= torch==2.13.0 torchvision==0.28.0
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml

.PHONY: demo test test-slow bench format options clean

demo: $(VENV)/.rwkvir
	$(BIN)/basicsr demo

test: $(VENV)/.rwkvir-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/cuda_on_cpu/*
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.rwkvir-test
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/.rwkvir
	$(BIN)/python benchmarks/bi_wkv.py
	$(BIN)/python benchmarks/network.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/complexity.py

format: $(VENV)/.rwkvir-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/* tests/cuda_on_cpu/*

options: $(VENV)/.rwkvir
	$(BIN)/python -m rwkvir.standard options

clean:
	rm -rf build .venv rwkvir_arch/_C.so *.egg-info

# torch first and pinned together with torchvision: left to itself, pip pairs them by replacing torch.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install "setuptools>=77" wheel ninja
	touch $@

$(VENV)/.rwkvir: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --no-build-isolation -e .
	touch $@

$(VENV)/.rwkvir-test: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --no-build-isolation -e ".[test]"
	touch $@ $(VENV)/.rwkvir
