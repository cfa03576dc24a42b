PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test test-fast soak lint docs wheel clean

demo: $(STAMP)  ## Set up, train a small VAE for a minute, sample from trained weights
	$(BIN)/python tools/demo.py

test: $(STAMP)  ## Set up, run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov=lightning_genmodels --cov-report=term $(PYTEST_ARGS)

test-fast: $(STAMP)  ## Properties of tiny models: no processes, no training by recipes, no Hub
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not (slow or hub or cluster or browser or gpu)" $(PYTEST_ARGS)

soak: $(STAMP)  ## The long counts: kills, preemptions, full disks, flipped bits, damaged reports; writes soak.log
	GENMODELS_SOAK=1 GENMODELS_TEST_KILLS=40 GENMODELS_TEST_PREEMPTIONS=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s --timeout 7200 \
		tests/test_survival.py tests/test_resume.py tests/test_figures.py tests/test_weights.py \
		tests/test_wrong_input.py tests/test_slurm.py | tee soak.log
	$(BIN)/python tools/mutations.py | tee -a soak.log

lint: $(STAMP)  ## Style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(STAMP)  ## The documentation, in docs/_build/html; its cells are executed, and warnings are errors
	$(BIN)/sphinx-build --fail-on-warning --keep-going --jobs 2 -b html docs docs/_build/html

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo docs/_build docs/models
