# Every target sets itself up: Python 3.11 or newer and make are all that a machine needs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := test
.PHONY: demo test test-long check docs site bench validate lock clean

demo: $(READY)  ## simulate the shipped example, and make its report and its timeline
	$(BIN)/mist run examples/demo.yaml --out out/demo --trace out/demo/timeline.json.gz \
		--report out/demo/report.html --overwrite

test: $(READY)
	$(BIN)/pytest -n 2 -q

test-long: $(READY)
	$(BIN)/pytest -n 2 -q -m long

check: $(READY)  ## all that must hold before a change lands
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports --no-logo
	$(MAKE) --no-print-directory docs
	$(MAKE) --no-print-directory test

docs: $(READY) site  ## run every example of the documentation, and build it as a site
	$(BIN)/pytest -n 2 -q -m docs

site: $(READY)  ## build/site/index.html: the documentation with its generated reference; any warning fails
	$(BIN)/sphinx-build -W --keep-going -q -d build/doctrees -b html docs build/site

bench: $(READY)  ## exact counts and this machine's times of benchmarks/scenarios; `python benchmarks/run.py --all` for the slow ones too
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/start_up.py

validate: $(READY)  ## docs/validation.md and the bands of results, from the measured points of MIST_DATA
	$(BIN)/python benchmarks/validate.py

# one file of pins with hashes for every supported Python and platform
lock:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--no-emit-index-url --no-config --quiet --upgrade --group dev --extra kernels --output-file requirements.lock pyproject.toml

clean:
	rm -rf .venv out build dist docs/reference .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MIST needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@
