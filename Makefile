# The two commands: `make repro` runs the pipeline, `make test` checks the project. Both set up .venv on first use.

PYTHON ?= python3
VENV := .venv
BENCH ?= baselines evaluate forecast fuzz quantize tokenize train
INSTALLED := $(VENV)/installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test lint audit bench compare preset sweep clean

repro: $(INSTALLED)  ## run what has changed of the pipeline, then print the results
	@python -m lib.schema
	@dvc repro $(ARGS)
	@python -m lib.reporting.summary

test: lint  ## lint, types and tests
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: $(INSTALLED)
	@ruff check .
	@mypy

bench: $(INSTALLED)  ## ratios measured in one run, all or BENCH="train ..."; see bench/RESULTS.md
	@for script in $(BENCH); do echo "bench.$$script" && python -m bench.$$script || exit 1; done

audit: $(INSTALLED)  ## every check of a legal score, thoroughly, on the finished run
	@python -m stages.audit

preset: $(INSTALLED)  ## make a preset the parameters: make preset NAME=pr585
	@python -m lib.presets $(NAME)

compare: $(INSTALLED)  ## parameters that differ, and figures: make compare REVS="HEAD~1 my-branch"; alone: HEAD, workspace, experiments
	@python -m lib.reporting.revisions $(REVS)

sweep: $(INSTALLED)  ## rate-distortion curve: make sweep TARGETS="400000 600000"
	@python -m lib.reporting.sweep $(TARGETS)

clean:  ## remove the environment and what the tools left; artifacts and the DVC cache stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; pass PYTHON=python3.11 to make, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
