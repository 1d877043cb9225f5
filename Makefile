# `make demo` and `make test` in one virtual environment, made on the first call from requirements/.
PYTHON      ?= python3
VENV        ?= .venv
DETECTRON2  ?=
ITERS       ?=
DATA        ?=
ARGS        ?=
PYTEST_ARGS ?=

# Threads that spin while they wait make a step several times as long beside other work.
export OMP_WAIT_POLICY ?= passive

ifeq ($(VENV),none)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
# Written last, so an interrupted set-up starts over. Another PYTHON or DETECTRON2 asks for another file.
STAMP := $(VENV)/.stamp-$(shell { $(PYTHON) -V; echo "$(DETECTRON2)"; } 2>&1 | cksum | cut -d " " -f 1)
endif
PIP := $(PY) -I -m pip --no-input --disable-pip-version-check install --no-warn-script-location
# The pinned Detectron2 holds Python files only, but its wheel is tagged CPython 3.10. pip installs it
# for other versions when given a target folder.
ANY_PYTHON := --python-version 3.10 --implementation cp --abi none --platform any --only-binary=:all:

# A shorter or longer demo is another training and gets its own folder.
DEMO_OPTS := $(if $(ITERS),SOLVER.MAX_ITER $(ITERS) OUTPUT_DIR output/occlusion_scenes_$(ITERS))
# Coverage of a part of the tests (PYTEST_ARGS) would mean nothing.
COVERAGE := --cov --cov-report=term:skip-covered --cov-fail-under=90

.PHONY: help setup demo photos results test lint clean-venv

help:  ## print this
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile
	@echo
	@echo "  PYTHON=python3.11      the Python to make .venv with (3.10 to 3.12)"
	@echo "  DETECTRON2=SOURCE      build a Detectron2 checkout or git+URL instead of the pinned wheel"
	@echo "  VENV=DIR               another place than .venv; VENV=none: make nothing, use PYTHON as it is"
	@echo "  ITERS=N ARGS='...'     demo: iterations, and further arguments for train_net.py"
	@echo "  DATA=FOLDER            photos: a folder as tools/train_photos.sh describes it"
	@echo "  PYTEST_ARGS='...'      test: arguments for pytest"

setup: $(STAMP)  ## only make the environment

demo: $(STAMP)  ## train and evaluate a small OANet on synthetic scenes with occlusion
	$(PY) train_net.py --config-file configs/OcclusionScenes/oanet_lite0.yaml $(DEMO_OPTS) $(ARGS)

photos: $(STAMP)  ## train and evaluate a small OANet on the photographs in DATA=FOLDER
	PY="$(PY)" tools/train_photos.sh "$(DATA)" $(ARGS)

results: $(STAMP)  ## train all that docs/RESULTS.md shows, over three seeds, and write it
	PY="$(PY)" tools/train_results.sh

test: $(STAMP)  ## run the tests; they fail when less than 90 % of oanet_d2 is covered
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile $(or $(PYTEST_ARGS),$(COVERAGE))

lint: $(STAMP)  ## ruff, and mypy on oanet_d2
	$(PY) -m ruff check .
	$(PY) -m mypy

clean-venv:  ## remove .venv
	rm -rf .venv

ifneq ($(VENV),none)
$(STAMP): requirements/lock.txt requirements/detectron2.txt
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 13) or sys.exit("Python 3.10 to 3.12 \
	is needed, this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.11 ...")'
	@test ! -e $(VENV) || ls -A $(VENV) | grep -qE '^\.(unfinished|stamp-)' || { \
	echo "$(VENV) was not made by this Makefile: remove it, or name another place with VENV=DIR" >&2; exit 1; }
	mkdir -p $(VENV) && touch $(VENV)/.unfinished
	find $(VENV) -mindepth 1 ! -name .unfinished -delete
	sed -nE '/^(pip|setuptools)==/,/[^\\]$$/p' requirements/lock.txt > $(VENV)/first.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r $(VENV)/first.txt
	$(PIP) --require-hashes --no-build-isolation -r requirements/lock.txt
ifneq ($(DETECTRON2),)
	$(PIP) --no-deps --no-build-isolation $(DETECTRON2)
else
	$(PIP) --no-deps --require-hashes $(ANY_PYTHON) -r requirements/detectron2.txt \
		--target $(VENV)/lib/python3.*/site-packages
	rm -r $(VENV)/lib/python3.*/site-packages/tools  # the wheel's developer scripts
endif
	$(PIP) --no-deps --no-build-isolation --editable .
	$(PY) -c "import cv2, panopticapi, torchvision; from detectron2 import model_zoo"
	mv $(VENV)/.unfinished $@
endif
