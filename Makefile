# make demo: from nothing to an answer about a photo, without torch.   make test: everything CI runs.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= out
PIP    := $(VENV)/bin/python -m pip
INSTALL := $(PIP) install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := setup.cfg pyproject.toml constraints.txt $(shell find mobilevlm export runtime -name '*.py')

.PHONY: demo test lint types clean

demo: $(VENV)/.export
	@rm -rf $(OUT)/tiny
	$(VENV)/bin/mobilevlm synth tiny -o $(OUT)/tiny
	$(VENV)/bin/mobilevlm export $(OUT)/tiny -o $(OUT)/tiny-int4
	$(VENV)/bin/mobilevlm run $(OUT)/tiny-int4 --image examples/cat.jpg \
		--prompt "What is in the picture?" --max-new-tokens 32
	@echo "(The weights are random, so the answer means nothing; every step of the way is real.)"

test: lint types
	$(VENV)/bin/pytest -n 2 -q

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	cd $(VENV) && bin/mypy --config-file ../setup.cfg -p mobilevlm

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mobilevlm needs Python 3.10 or newer: make PYTHON=python3.11 …" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "no venv module: sudo apt-get install python3-venv" >&2; rm -rf $(VENV); exit 2; }

# The installed package is what is tested, so it is installed again when a source file changes.
$(VENV)/.export: $(VENV)/bin/pip $(SOURCES)
	$(INSTALL) '.[export]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/pip $(SOURCES)
	$(INSTALL) '.[reference,dev]'
	@touch $@ $(VENV)/.export
