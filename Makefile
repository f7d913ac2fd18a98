# The two commands: `make repro` runs the pipeline, `make test` checks the project. Both set up .venv on first use.

PYTHON ?= python3
VENV := .venv
BENCH ?= baselines compile evaluate forecast fuzz published quantize tokenize train
INSTALLED := $(VENV)/installed
LOWEST := .venv-lowest
PYTEST := -m pytest -n 2 --dist loadgroup
THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
# Tools are run as modules: their scripts in the environment have its path inside, which is another one after the folder was moved.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test quick lint lowest audit decode bench compare deps preset size sweep talk gpu-bundle clean

repro: $(INSTALLED)  ## run what has changed of the pipeline, then print the results
	@python -m tools.check_params
	@python -m dvc repro $(ARGS)
	@python -m tools.summary
	@$(if $(ARGS),,echo && echo "report: artifacts/report/report.html")

test: lint  ## lint, types and tests
	@$(THREADS) python $(PYTEST) $(ARGS)

quick: $(INSTALLED)  ## the tests that take little time; ARGS as for test
	@$(THREADS) python $(PYTEST) -m "not slow" $(ARGS)

lint: $(INSTALLED)
	@python -m ruff check .
	@python -m mypy

lowest: $(LOWEST)/installed  ## the tests that depend on versions, with the lowest ones that requirements/ claims; ARGS as for test
	@$(THREADS) $(LOWEST)/bin/python $(PYTEST) \
		$(addprefix tests/,artifacts audit calibration compression data evaluation generation model published quantization training) $(ARGS)

bench: $(INSTALLED)  ## ratios measured in one run, all or BENCH="train ..."; see bench/RESULTS.md
	@for script in $(BENCH); do echo "bench.$$script" && python -m bench.$$script || exit 1; done

audit: $(INSTALLED)  ## every check of a legal score, thoroughly, on the finished run
	@python -m tools.audit

decode: $(INSTALLED)  ## validation text through a strategy as a compressor, and back: make decode SEED=1337 TOKENS=300 STRATEGY=lora
	@python -m tools.decode $(if $(SEED),--seed $(SEED)) $(if $(TOKENS),--tokens $(TOKENS)) $(if $(STRATEGY),--strategy $(STRATEGY)) $(ARGS)

preset: $(INSTALLED)  ## make a preset the parameters: make preset NAME=pr585; alone: list them, and say which one is active
	@python -m tools.preset $(NAME)

compare: $(INSTALLED)  ## parameters that differ, and figures: make compare REVS="HEAD~1 my-branch"; alone: HEAD, workspace, experiments
	@python -m tools.compare $(REVS)

size: $(INSTALLED)  ## which size of model the byte budget wants, from three short trainings: make size STEPS=400 EQUAL=steps
	@python -m tools.size $(if $(STEPS),--steps $(STEPS)) $(if $(EQUAL),--equal $(EQUAL))

sweep: $(INSTALLED)  ## rate-distortion curve: make sweep TARGETS="400000 600000"
	@python -m tools.sweep $(TARGETS)

talk: $(INSTALLED)  ## text from the artifact: make talk PROMPT="The"; more options: make talk ARGS="--hard README.md"
	@python -m tools.talk $(if $(PROMPT),--prompt "$$PROMPT") $(ARGS)

deps: $(INSTALLED)  ## write the code that every stage depends on into dvc.yaml
	@python -m tools.deps

gpu-bundle: $(INSTALLED)  ## pack .gpu for a GPU machine without a network: PYTHON_VERSION=3.12 TEXT=mine.jsonl.zst TOKENIZER=mine.model
	@python -m bench.gpu_bundle $(if $(PYTHON_VERSION),--python-version $(PYTHON_VERSION)) $(if $(TEXT),--text $(TEXT)) \
		$(if $(TOKENIZER),--tokenizer $(TOKENIZER)) $(if $(GIVEN),--given $(GIVEN))

clean:  ## remove the environment and what the tools left; artifacts and the DVC cache stay
	rm -rf $(VENV) $(LOWEST) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; pass PYTHON=python3.11 to make, found " + sys.version.split()[0])'
	@echo "installing packages into $(VENV), this once: 5 GB on Linux, where torch comes with CUDA, else 1.5 GB; some minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(LOWEST)/installed: $(addprefix requirements/,run.txt test.txt hub.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the lowest Python is 3.11; pass PYTHON=python3.11 to make, found " + sys.version.split()[0])'
	@echo "installing the lowest versions into $(LOWEST), this once: 5 GB on Linux; some minutes"
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/python -m uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct $(addprefix -r ,$^)
	@touch $@
