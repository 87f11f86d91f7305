# Two commands: `make study` and `make test`. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
# An index of CPU-only PyTorch wheels, to spare gigabytes of CUDA: make study TORCH_INDEX=URL
TORCH_INDEX ?=
PRESET ?= quick
OUT ?= out/$(PRESET)
BIN := $(VENV)/bin

.PHONY: study test setup lint types clean

study: $(VENV)/.ready
	@$(BIN)/sparring study $(PRESET) --out $(OUT)

test: $(VENV)/.ready
	@$(BIN)/python -m pytest -q -n auto

setup: $(VENV)/.ready

lint: $(VENV)/.ready
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.ready
	@$(BIN)/mypy

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sparring needs Python 3.11 or newer; name one with: make study PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
