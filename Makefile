# make demo: set up and show the main job. make test: the tests. Both work twice in a row, and offline after the first time.
# make test-portable: the tests that compute, on a processor's plainest kernels and one thread: none rests on rounding.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-portable check clean

NUMERIC := baselines causal edit evaluation families find finders forms hallucination inspect interventions load lookup \
  maths optimised patch regions sensitivity specificity truth weights

demo: .venv/installed
	@mkdir -p demo
	$(BIN)/mmneurons find --report demo/report.html --json demo/finding.json
	@echo "open demo/report.html in a browser"

test: .venv/installed
	$(BIN)/python -m pytest

test-portable: .venv/installed
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest $(NUMERIC:%=tests/test_%.py)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'mmneurons needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv demo
