# Two commands: `make study` and `make test`. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
# An index of CPU-only PyTorch wheels, to avoid gigabytes of CUDA: make study TORCH_INDEX=URL
TORCH_INDEX ?=
PRESET ?= quick
OUT ?= out/$(PRESET)
# Extras to install: "test", or "all" with Ray, MLflow, TensorBoard and the other attack libraries
EXTRAS ?= test
# Versions: those that CI uses, or none for the newest (make suite CONSTRAINTS=)
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(EXTRAS)
PYTEST := $(BIN)/python -m pytest -q -n auto
# Whole networks in the manner of torchvision and timm, and random ones: they take minutes
ARCHITECTURES := tests/test_zoo.py tests/test_architectures.py tests/graph/test_lowering_benchmark.py
# Tests that hold numbers against frozen or exact ones, which depend on the processor's instructions. Graphs, weights
# and other libraries are held against what the same processor computes: they run under every cap in `make nightly`.
NUMERIC := tests/attacks tests/bounds tests/deploy tests/sparsity tests/train tests/test_metrics.py \
  --ignore=tests/attacks/algorithms/test_peers.py

.PHONY: study test suite architectures blocks docs notebook picture quickstart numeric wheel nightly setup lint types clean

study: $(READY)
	@$(BIN)/sparring study $(PRESET) --out $(OUT)

test: suite architectures blocks

# With COVER=1 it counts which lines and branches run, and fails below 95% of lines; that needs EXTRAS=all
suite: $(READY)
	@$(PYTEST) $(addprefix --ignore=,$(ARCHITECTURES) tests/docs) \
	  $(if $(COVER),--cov --cov-report=json:.coverage.json --cov-report=term:skip-covered)
	@$(if $(COVER),$(BIN)/python .ci/covered .coverage.json 95)

architectures: $(READY)
	@$(PYTEST) $(wildcard $(ARCHITECTURES))

# Every command and Python block of README and docs, as written
blocks: $(READY)
	@$(PYTEST) tests/docs

# The documentation site, into out/site: strict, so that a broken link fails. Needs EXTRAS=docs or all
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "open out/site/index.html"

# The tutorial's outputs, executed again
notebook: $(READY)
	@$(BIN)/python .ci/notebook docs/tutorial.ipynb

# The picture in README: the first screen of quick's report
picture: $(READY)
	@$(BIN)/sparring study quick --out out/quick >/dev/null
	@chromium --headless --no-sandbox --hide-scrollbars --window-size=1280,1395 \
	  --screenshot=docs/results/quick.png "file://$(CURDIR)/out/quick/report.html" >/dev/null 2>&1

# README's quickstart decides the claims that `make study` decides here, and its table lists all attacks
quickstart: study
	@$(BIN)/python .ci/readme $(OUT)

# Under .ci/CAP.env: make numeric CAP=avx2, or sse
numeric: $(READY)
	@env $$(grep -v '^\#' .ci/$(CAP).env) $(PYTEST) $(NUMERIC)

# Build and check what would be published, and try it in a separate environment that shares this one's packages.
# Needs EXTRAS=all
wheel: $(READY)
	@rm -rf build dist && $(BIN)/python -m build --outdir dist . >/dev/null
	@$(BIN)/python -m twine check --strict dist/*.whl dist/*.tar.gz && $(BIN)/python .ci/contents dist
	@$(PYTHON) -m venv dist/tried && $(BIN)/python .ci/borrow dist/tried && \
	  dist/tried/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
	@cd dist && tried/bin/sparring --version && tried/bin/sparring study quick --set seeds=1 --set 'sparsities=[0.9]' \
	  --quiet >/dev/null && test -s out/quick/report.html

# Everything: long trainings in pages, networks of other libraries, the suite under each cap. Takes a night, and goes on
# to its end where a part fails. Needs EXTRAS=all
nightly: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[timm,torchvision,hf]' accelerate
	@failed=0; $(PYTEST) -m nightly || failed=1; \
	  $(BIN)/python benchmarks/models.py --hubs || failed=1; \
	  $(PYTEST) || failed=1; \
	  for cap in avx2 sse; do env $$(grep -v '^\#' .ci/$$cap.env) $(PYTEST) || failed=1; done; \
	  exit $$failed

setup: $(READY)

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell *.md docs src tests benchmarks

types: $(READY)
	@$(BIN)/mypy

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sparring needs Python 3.11 or newer; name one with: make study PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[$(EXTRAS)]'
	@$(if $(filter all,$(EXTRAS)),$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  $(addprefix -c ,$(CONSTRAINTS)) adv-lib)  # it pins visdom, which no longer builds, and torchvision; no attack needs either
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
