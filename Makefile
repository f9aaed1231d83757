# Everything a person or CI runs. `make export` is the whole chain on the default recipe.
RECIPE ?= examples/movie-sentiment.toml
OUT    ?= build/$(basename $(notdir $(RECIPE)))
BUNDLE ?= $(OUT)/bundle
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
BUILD  ?= $(OUT)

.PHONY: install export test test-gpu test-arm lint types bench bench-check format docs lock clean

# The environment is made again when what it is made from changes.
install: $(VENV)/.installed

$(VENV)/.installed: constraints.txt pyproject.toml runtime/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "edgebert needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; set PYTHON=python3.12, say")'
	@echo "installing into $(VENV): some minutes, about 2 GB with PyTorch's CPU build"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt \
	    --build-constraint constraints.txt \
	    --editable './runtime[cpu,rtx]' --editable '.[cpu,rtx]' --group dev
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # as pip would, but on all cores
	touch $@

# EXPORT="--junit gate.xml" passes options on.
export: install
	$(BIN)/edgebert export "$(RECIPE)" --out "$(OUT)" $(EXPORT)

test: install
	$(BIN)/pytest -n logical --dist worksteal --cov --cov-report=term

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy
	$(BIN)/python tools/check_tensorrt_types.py

# Needs edgebert-runtime and pytest alone. On a Jetson, take the environment that docs/jetson.md
# makes, which sees JetPack's TensorRT: make test-gpu GPU_PYTHON=~/edgebert/bin/python BUNDLE=bundle
test-gpu: $(if $(GPU_PYTHON),,install)
	EDGEBERT_GPU_BUNDLE="$(BUNDLE)" $(or $(GPU_PYTHON),$(BIN)/python) -m pytest \
	    --confcutdir=tests/gpu tests/gpu -s

# The runtime on an emulated aarch64, beside this machine's; as root, some minutes, after `make export`.
test-arm: install
	$(BIN)/python tools/run_on_arm.py "$(BUNDLE)"

# Beside other ways to run the same model, after `make export`; BENCH=--quick takes less.
bench: install
	$(BIN)/python benchmarks/speed.py "$(RECIPE)" "$(BUILD)" $(BENCH)

# Beside a bare script on the same model; fails under benchmarks/floors.toml.
bench-check: install
	$(BIN)/python benchmarks/check.py "$(BUILD)" $(BENCH)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/edgebert recipe --reference > docs/recipe.md
	$(BIN)/edgebert report --schema > docs/report.schema.json

# Newest versions that fit, for every supported Python and platform; needs uv.
lock:
	uv pip compile --universal --python-version 3.10 --no-header --no-annotate --no-emit-index-url \
	    --quiet --upgrade --extra cpu --extra rtx --group dev --no-emit-package edgebert-runtime \
	    --output-file constraints.txt pyproject.toml
	sed -i '1i # Made by `make lock`; `make install` takes exactly these versions.' constraints.txt

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*
