# make demo    tune two problems on this machine, serve them, and run a layer with the answers
# make test    every test
# make test-gpu    the tests that need a GPU, a process per core: most of their time is compilation
# make screenshots    the pictures of docs/dashboard, taken of the dashboard as it is now
# make contract    thousands of requests made from the service's OpenAPI document
# make check   what a change must pass: format, lint, types, tests
# The first use makes .venv with the tested set; later ones need no network.

PYTHON ?= python3
PY := .venv/bin/python
LOCK_SUM := $(shell cksum < requirements/lock.txt | cut -d' ' -f1)
HERE_SUM := $(shell pwd | cksum | cut -d' ' -f1)
PACKAGES := .venv/.packages-$(LOCK_SUM)
INSTALLED := .venv/.installed-$(LOCK_SUM)-$(HERE_SUM)
TORCH := $(shell sed -n 's/^torch==/torch==/p' requirements/lock.txt)

.PHONY: install chromium demo test screenshots contract test-gpu memcheck check format lock clean

install: $(INSTALLED)

$(PACKAGES): requirements/lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tilewise needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/lock.txt
	@rm -f .venv/.packages-*; touch $@

# Installed from the folder as it is now, so again when the folder moved; needs no network.
$(INSTALLED): $(PACKAGES) pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --editable .
	@rm -f .venv/.installed-*; touch $@

# The dashboard is tested in Debian's Chromium; Playwright's own browsers are never downloaded.
chromium:
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null || { \
	    echo "the dashboard's tests need Chromium: install the package chromium, as root, and run make again" >&2; exit 1; }; \
	  apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive \
	    apt-get install --quiet=2 --yes --no-install-recommends chromium fonts-dejavu-core > /dev/null; }

demo: $(INSTALLED)
	$(PY) examples/demo.py

test: $(INSTALLED) chromium
	$(PY) -m pytest -n auto --maxprocesses=4 --dist=worksteal

screenshots: $(INSTALLED) chromium
	$(PY) -m tests.dashboard.screenshots docs/dashboard

contract: $(INSTALLED)
	TILEWISE_SCHEMA_EXAMPLES=250 $(PY) -m pytest --timeout 1800 -s tests/api/test_schema.py

test-gpu: $(INSTALLED)
	$(PY) -m pytest -m gpu -n auto --maxprocesses=14 --dist=worksteal

# Every kernel once under compute-sanitizer, which comes with CUDA's toolkit; torch's caching allocator would hide a
# read behind the end of a tensor.
memcheck: $(INSTALLED)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(PY) -m tilewise.bench.memcheck

check: $(INSTALLED) chromium
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m mypy tests examples
	$(PY) -m pytest -n auto --maxprocesses=4 --dist=worksteal

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Writes the versions of the environment at hand into the lock file.
lock: $(INSTALLED)
	@head -1 requirements/lock.txt > .venv/lock.txt
	@$(PY) -m pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu//' >> .venv/lock.txt
	@mv .venv/lock.txt requirements/lock.txt

clean:
	rm -rf .venv .demo build dist
