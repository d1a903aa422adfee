# make demo: set up and show the main job. make test: the tests. Both work twice in a row, and offline after the first time.
# make test-slow: the tests that take long, those in a browser, on Ray and of the photo model among them.
# make test-matrix: what depends on transformers, under its lowest, a middle and its newest version.
# make site: the documentation, in site/; a link that leads nowhere is an error.
# make test-app: the web app's tests, with Gradio and a driver of Debian's Chromium; with MMNEURONS_AXE=.../axe.min.js, axe too.
# make test-notebooks: the notebooks of docs/notebooks, executed. Their outputs are made by .ci/notebooks.py --write.
# make test-portable: the tests that compute, on a processor's plainest kernels and one thread: none rests on rounding.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-app test-notebooks test-matrix test-portable check site clean

# One thread to a process: tests are many small computations, which threads do not speed up. A file of tests to a process,
# since its tests share what they make; those that take long share little, so each goes to a process that is free.
PROCESSES := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4
PYTEST := $(PROCESSES) --dist loadfile

NUMERIC := baselines causal edit equal_change evaluation families find finders forms gradient hallucination inspect interventions load lookup \
  kept_references maths patch regions scores sensitivity specificity truth weights

TRANSFORMERS := 4.57.6 5.3.0 5.24.0
BY_VERSION := asking checkpoint families find load patch pocket processors prompts weights

demo: .venv/installed
	@mkdir -p demo
	$(BIN)/mmneurons find --report demo/report.html --json demo/finding.json
	@echo "open demo/report.html in a browser"

test: .venv/installed
	$(PYTEST)

test-slow: .venv/installed
	$(PROCESSES) --dist load --maxschedchunk 1 -m slow

test-portable: .venv/installed
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE \
	  $(PYTEST) -m "" $(NUMERIC:%=tests/test_%.py)

test-matrix: $(TRANSFORMERS:%=test-with-%)

# Warnings are errors in the environment that constraints.txt describes; another version warns of other things.
test-with-%: .venv-matrix/%/installed
	$(PYTEST:$(BIN)%=.venv-matrix/$*/bin%) -W default $(BY_VERSION:%=tests/test_%.py)

# Everything but transformers, and what it pins, is read from .venv.
.PRECIOUS: .venv-matrix/%/installed
.venv-matrix/%/installed: .venv/installed
	$(call venv-above,.venv-matrix/$*)
	.venv-matrix/$*/bin/python -m pip install --quiet --disable-pip-version-check transformers==$*
	@touch $@

# One process: its tests start a server and a browser each.
test-app: .venv-app/installed
	MMNEURONS_REQUIRE_APP=1 OMP_NUM_THREADS=1 .venv-app/bin/python -m pytest -m "" tests/test_web_page.py tests/test_web_visit.py

# Apart from .venv, since Gradio asks for an older Pillow than the images of the tests; it works with ours.
.venv-app/installed: .venv/installed .ci/app.txt
	$(call venv-above,.venv-app)
	.venv-app/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r .ci/app.txt
	@touch $@

# The kernel is the python that is found first.
test-notebooks: .venv-notebooks/installed
	PATH="$(CURDIR)/.venv-notebooks/bin:$$PATH" OMP_NUM_THREADS=1 .venv-notebooks/bin/python .ci/notebooks.py

.venv-notebooks/installed: .venv/installed .ci/notebooks.txt
	$(call venv-above,.venv-notebooks)
	.venv-notebooks/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r .ci/notebooks.txt
	@touch $@

# An environment that reads from .venv what it does not have itself.
define venv-above
$(BIN)/python -m venv --clear $(1)
$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
  >"$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
endef

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

site: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'mmneurons needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .venv-app .venv-notebooks .venv-matrix demo site
