# "make install", for packagers of other distributions and for installations by hand. The names of
# the folders are those of the GNU Coding Standards; DESTDIR is put before all of them. The
# modules are private, as in Debian's package: nothing else is meant to import them, and the
# sandbox lets the service map the C module from there. The package outlive, which is for any
# program, goes to pythondir; by default, it is private as well.

prefix ?= /usr/local
exec_prefix ?= $(prefix)
bindir ?= $(exec_prefix)/bin
sbindir ?= $(exec_prefix)/sbin
libdir ?= $(exec_prefix)/lib
datarootdir ?= $(prefix)/share
mandir ?= $(datarootdir)/man
# Not below the prefix: the manual pages and firewalls expect /etc.
sysconfdir ?= /etc
# Those of systemd.
systemddir ?= $(prefix)/lib/systemd
unitdir ?= $(systemddir)/system
presetdir ?= $(systemddir)/system-preset
catalogdir ?= $(systemddir)/catalog
# The Python that runs the daemon.
python ?= /usr/bin/python3

INSTALL ?= install
INSTALL_PROGRAM = $(INSTALL) -D --mode=755
INSTALL_DATA = $(INSTALL) -D --mode=644
STAGE := build/install
moduledir = $(libdir)/tcpupperd
pythondir ?= $(moduledir)

# Replaces Debian's paths by those of the installation. The units allow programs to be executed in
# /usr/lib and, if there is one, /usr/lib64; modules elsewhere are added.
ELSEWHERE = $(filter-out /usr/lib/% /usr/lib64/%,$(moduledir))
RELOCATE = sed \
	-e 's,/usr/bin/python3,$(python),g' \
	-e 's,/usr/lib/tcpupperd,$(moduledir),g' \
	-e 's,/usr/sbin/tcpupperd,$(sbindir)/tcpupperd,g' \
	-e 's,/etc/tcpupperd,$(sysconfdir)/tcpupperd,g' \
	$(if $(ELSEWHERE),-e '/Paths=.*\/tcpupperd$$/s|$$| $(ELSEWHERE)|')
UNITS = tcpupperd.service tcpupperd.socket tcpupperd-lab.socket tcpupperd-metrics.socket \
	tcpupperd-proxy.socket

# What depends on the paths is always made again, because the paths are not files.
build: ## build what "make install" installs
	rm -rf $(STAGE)
	mkdir -p $(STAGE)/commands $(STAGE)/completion $(STAGE)/systemd
	$(PYTHON) setup.py --quiet build --build-base $(STAGE) --build-lib $(STAGE)/modules
	for name in $(UNITS); do \
		$(RELOCATE) systemd/$$name >$(STAGE)/systemd/$$name && \
		sed -f systemd/instance.sed $(STAGE)/systemd/$$name \
			>$(STAGE)/systemd/$${name%.*}@.$${name##*.} || exit; \
	done
	for name in tcpupper tcpupperd; do \
		$(RELOCATE) data/commands/$$name >$(STAGE)/commands/$$name || exit; \
	done
	$(RELOCATE) data/apparmor/tcpupperd >$(STAGE)/apparmor
	$(PYTHON) data/completion/make.py bash >$(STAGE)/completion/bash
	$(PYTHON) data/completion/make.py zsh >$(STAGE)/completion/zsh

install: build ## install into DESTDIR, prefix, libdir, unitdir, ... (see install.mk)
	mkdir -p '$(DESTDIR)$(moduledir)' '$(DESTDIR)$(pythondir)'
	cp -R $(STAGE)/modules/tcpupperd '$(DESTDIR)$(moduledir)/'
	cp -R $(STAGE)/modules/outlive '$(DESTDIR)$(pythondir)/'
	$(PYTHON) -m compileall -q -s '$(DESTDIR)' '$(DESTDIR)$(moduledir)' '$(DESTDIR)$(pythondir)/outlive'
	$(INSTALL_DATA) systemd/release-listeners '$(DESTDIR)$(moduledir)/release-listeners'
	$(INSTALL_PROGRAM) $(STAGE)/commands/tcpupper '$(DESTDIR)$(bindir)/tcpupper'
	$(INSTALL_PROGRAM) $(STAGE)/commands/tcpupperd '$(DESTDIR)$(sbindir)/tcpupperd'
	$(INSTALL_DATA) -t '$(DESTDIR)$(unitdir)' $(STAGE)/systemd/*
	$(INSTALL_DATA) -t '$(DESTDIR)$(presetdir)' systemd/80-tcpupperd.preset
	$(INSTALL_DATA) -t '$(DESTDIR)$(catalogdir)' data/catalog/tcpupperd.catalog
	mkdir -p '$(DESTDIR)$(sysconfdir)/tcpupperd/conf.d'
	test -e '$(DESTDIR)$(sysconfdir)/tcpupperd/tcpupperd.toml' || \
		$(INSTALL_DATA) -t '$(DESTDIR)$(sysconfdir)/tcpupperd' data/tcpupperd.toml
	for page in data/man/*.[158]; do \
		$(INSTALL_DATA) -t "$(DESTDIR)$(mandir)/man$${page##*.}" $$page || exit; \
	done
	$(INSTALL_DATA) $(STAGE)/completion/bash \
		'$(DESTDIR)$(datarootdir)/bash-completion/completions/tcpupperd'
	ln -sf tcpupperd '$(DESTDIR)$(datarootdir)/bash-completion/completions/tcpupper'
	$(INSTALL_DATA) $(STAGE)/completion/zsh '$(DESTDIR)$(datarootdir)/zsh/site-functions/_tcpupperd'
	$(INSTALL_DATA) $(STAGE)/apparmor '$(DESTDIR)$(sysconfdir)/apparmor.d/tcpupperd'
	$(INSTALL_DATA) -t '$(DESTDIR)$(prefix)/lib/firewalld/services' data/firewalld/tcpupperd.xml
	$(INSTALL_DATA) -t '$(DESTDIR)$(sysconfdir)/ufw/applications.d' data/ufw/tcpupperd

.PHONY: build install
