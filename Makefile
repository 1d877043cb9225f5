# The environment is made once, in .venv, by tools/setup_env.py, and looked at in 0.1 s afterwards.
PYTHON     ?= python3
VENV       ?= .venv
DETECTRON2 ?=
ITERS      ?=
ARGS       ?=
PYTEST_ARGS ?=

# Of another length it is another training, which does not go into the folder of the first.
DEMO_OPTS = $(if $(ITERS),SOLVER.MAX_ITER $(ITERS) OUTPUT_DIR output/occlusion_scenes_$(ITERS))

# With VENV=none, $(PYTHON) itself is used as it is.
PY    = $(if $(filter none,$(VENV)),$(PYTHON),$(VENV)/bin/python)
# Of a part of the tests (PYTEST_ARGS) it would mean nothing.
COVERAGE = --cov --cov-report=term:skip-covered --cov-fail-under=90
SETUP = @$(PYTHON) tools/setup_env.py --venv "$(VENV)" --detectron2 "$(DETECTRON2)"

.PHONY: help demo test lint setup clean-venv

help:  ## print this
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile
	@echo
	@echo "  PYTHON=python3.11      the Python to make .venv with (3.10 to 3.12)"
	@echo "  DETECTRON2=SOURCE      build a Detectron2 checkout or git+URL instead of the pinned wheel"
	@echo "  VENV=DIR               another place than .venv; VENV=none: make nothing, use PYTHON as it is"
	@echo "  ITERS=N ARGS='...'     demo: iterations, and anything else for train_net.py"
	@echo "  PYTEST_ARGS='...'      test: anything else for pytest"

demo:  ## train and evaluate a small OANet on made-up scenes with occlusion
	$(SETUP)
	$(PY) train_net.py --config-file configs/OcclusionScenes/oanet_R_18.yaml $(DEMO_OPTS) $(ARGS)

test:  ## run the tests; fewer than 90 % of the lines of oanet_d2 run in them: an error
	$(SETUP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto $(or $(PYTEST_ARGS),$(COVERAGE))

lint:  ## ruff, and mypy over oanet_d2
	$(SETUP)
	$(PY) -m ruff check .
	$(PY) -m mypy

setup:  ## only make the environment, or check the one there is by importing everything
	$(SETUP) --verify

clean-venv:  ## remove .venv
	rm -rf .venv .venv.lock
