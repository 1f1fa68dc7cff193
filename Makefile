PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_VENV := .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready
# Python keeps compiled modules, whatever the environment says. Without, every process
# that imports TensorFlow compiles its modules again, which takes ten seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all lint bench experiments figures notebooks links docs
.PHONY: fuzz mutants coverage release-check matrix venv clean

# Trains a language model on the Python language reference, recalibrates, folds,
# exports and serves it, and sends it text. Output goes to runs/demo.
demo: $(READY)
	rm -rf runs/demo
	$(BIN)/python examples/language_model.py --output-dir runs/demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=60

# Every test, those marked slow too: more than an hour. TESTS: more options for pytest.
test-all: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "" $(TESTS)

# New examples of the properties for ten minutes of CPU time; a failure ends the run and
# prints how to reproduce it. FUZZ: more options, such as `--seed 5`.
fuzz: $(READY)
	$(BIN)/python tests/tools/fuzz.py $(FUZZ)

# Mutants of statistics, recurrence and folding, with the fast tests of each module: 10 to
# 20 minutes. Results go to runs/mutants.jsonl; an interrupted run goes on from there.
mutants: $(READY)
	$(BIN)/python tests/tools/mutants.py $(MUTANTS)

# Branch coverage of the packages by the fast tests; fails below the limit in
# pyproject.toml. TESTS: more options for pytest.
coverage: $(READY)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal -q $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Speed and memory against Keras and torch, some 25 minutes; writes RESULTS.md and
# charts in benchmarks/. torch.nn.LSTM is measured where torch is installed.
bench: $(READY)
	$(BIN)/python benchmarks/run.py

# The runs behind docs/experiments.md: some four hours on two cores, each made once;
# interrupted ones go on. DATA_DIR: a folder with ptb/ and fsdd/, else downloaded.
experiments: $(READY)
	$(BIN)/python examples/paper/experiments.py $(if $(DATA_DIR),--data-dir $(DATA_DIR)) $(RUNS)

# Figures and page from the logs in docs/experiments/.
figures: $(READY)
	$(BIN)/python examples/paper/figures.py

# Runs the notebooks of examples/ and writes their outputs into them.
notebooks: $(READY)
	$(BIN)/python examples/notebooks.py

# Writes the repository's address, which pyproject.toml has, into the notebooks,
# README.md and CITATION.cff.
links: $(READY)
	$(BIN)/python release/address.py

# Builds the wheel and the source distribution and installs them into empty
# environments, one for each extra: some 20 minutes, with downloads.
release-check: $(READY)
	$(BIN)/python release/check.py $(CHECK)

# Fast tests on each supported Python that is installed, with the oldest and the newest
# TensorFlow and Keras: some 5 minutes each, with downloads.
matrix: $(READY)
	$(BIN)/python release/matrix.py --skip-missing $(MATRIX)

# The documentation site, in build/site. Warnings are errors. Its packages have an
# environment of their own: no test needs them, and they need no TensorFlow.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	$(DOCS_VENV)/bin/python docs/tools/check.py

$(DOCS_READY): docs/requirements.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-compile -r docs/requirements.txt
	touch $@

venv: $(READY)

# Packages at the versions they were tested with. `--no-deps`: the list is
# complete, so nothing is left to resolve.
$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) runs build *.egg-info .coverage .coverage.*
