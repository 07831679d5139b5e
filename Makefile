PYTHON ?= python3
BGFLOW ?= ../bgflow
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo ala2 molecules figures test coverage integrations bgflow oldest lint types docs dist bench stress clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.examples  ## learn a checkerboard and draw it, two minutes
	$(BIN)/python examples/toy_density.py --target checkerboard --preset quick

ala2: .venv/.installed  ## Boltzmann generator of alanine dipeptide, ten minutes
	$(BIN)/python examples/boltzmann_generator.py --minutes 10

molecules: pyproject.toml  ## install what p4flows.molecules needs into .venv
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[molecules]" -c constraints.txt

# A script draws where there are records: files under results/, script and options.
drawn = $(if $(wildcard results/$(1)),$(BIN)/python examples/$(2) --figures)
TOY := toy_density.py --all --compare --tuned

figures: .venv/.installed  ## tables and figures again, from the records under results/
	$(call drawn,toy_density/*-quick-0.json,$(TOY) --preset quick)
	$(call drawn,toy_density/*-paper-0.json,$(TOY) --preset paper)
	$(call drawn,linear_problems/runs/*-quick-*.json,linear_problems.py --preset quick)
	$(call drawn,linear_problems/runs/*-paper-*.json,linear_problems.py --preset paper)
	$(call drawn,image_patches/*-quick-0.json,image_patches.py --preset quick)
	$(call drawn,image_patches/*-long-0.json,image_patches.py --preset long)
	$(call drawn,alanine_dipeptide/data-quick-0.json,alanine_dipeptide.py --preset quick)
	$(call drawn,alanine_dipeptide/data-paper-0.json,alanine_dipeptide.py --preset paper)
	$(call drawn,alanine_dipeptide/data-beyond-0.json,alanine_dipeptide.py --preset beyond)

test: lint types docs  ## lint, type check, site, doctests and tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

coverage: .venv/.installed  ## the tests again, and what they do not reach
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing

integrations: .venv-integrations/.installed  ## P4 layers in the loops of other libraries, in an environment of its own
	OMP_NUM_THREADS=1 .venv-integrations/bin/python -m pytest -p no:randomly tests/integrations

bgflow: .venv-bgflow/.installed  ## the tests with bgflow, of the checkout that BGFLOW names
	@test -f "$(BGFLOW)/bgflow/__init__.py" || { echo "BGFLOW=$(BGFLOW) is no checkout of bgflow: docs/bgflow.md"; exit 1; }
	BGFLOW="$(abspath $(BGFLOW))" OMP_NUM_THREADS=1 .venv-bgflow/bin/python -m pytest -p no:randomly tests/test_bgflow*.py

oldest: .venv-oldest/.installed  ## the tests with the oldest torch, in an environment of its own
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2

lint: .venv/.installed  ## ruff (rules and format), spelling and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/lint-imports

types: .venv/.installed  ## mypy on the package
	$(BIN)/mypy p4flows

docs: .venv/.installed  ## the site, in docs/_build; warnings are errors
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build

dist:  ## wheel and sdist, checked and imported in an empty environment
	rm -rf dist build
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --disable-pip-version-check --quiet build twine
	build/tools/bin/python -m build --outdir dist
	build/tools/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --disable-pip-version-check --quiet dist/*.whl -c constraints.txt
	cd build && empty/bin/python -c "import p4flows; print(p4flows.P4InvTransform(3), p4flows.__file__)"

bench: .venv/.installed  ## speed and memory of the layers
	$(BIN)/python benchmarks/layers.py

stress: .venv/.installed  ## try for ten minutes what may go wrong with the numbers
	$(BIN)/python benchmarks/stress.py

.venv-integrations/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python -m pip install --disable-pip-version-check -e ".[integrations]"
	@touch $@

.venv-bgflow/.installed: pyproject.toml
	$(PYTHON) -m venv --upgrade-deps .venv-bgflow
	.venv-bgflow/bin/python -m pip install --disable-pip-version-check -e ".[bgflow,molecules]" --group test
	@touch $@

.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv --upgrade-deps .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check torch==2.4.0 -e . --group test
	@touch $@

clean:  ## remove .venv, caches and builds; results/ stays
	rm -rf .venv .venv-integrations .venv-bgflow .venv-oldest .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The demo needs little of what the tests do; pip has --group since 25.1.
.venv/.examples: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit( \
	'p4flows needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv --upgrade-deps .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[examples]" -c constraints.txt
	@touch $@

.venv/.installed: .venv/.examples
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[examples,molecules]" --group dev -c constraints.txt
	@touch $@
