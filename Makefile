# The commands of this project; `make` alone lists them.
SHELL   := /bin/bash
PREFIX  ?= /usr/local
DESTDIR ?=
CARGO   ?= cargo
TARGET  := $(or $(CARGO_TARGET_DIR),target)
BIN     := $(TARGET)/bin
SHIM    := containerd-shim-proxmox-lxcri-v1
# The backend lxc looks for it beside the shim.
INIT    := proxmox-lxcri-init
# Of the package: configurations to start from.
EXAMPLES = $(PREFIX)/share/doc/proxmox-lxcri

.DEFAULT_GOAL := help
.PHONY: help build demo test test-node node-shell bench install uninstall clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

build: $(BIN)/$(SHIM) $(BIN)/$(INIT) ## build the release of the shim and of the init of its LXC containers, into target/bin

# The shim at a fixed address and without other libraries than the C library, because relocated pages are each process's own and each
# library takes every start of a shim longer (docs/decisions/0023). Its init static, because there is less
# to load when a container begins, and nothing of the host to look for. Both in a place of their own: what cargo links for tests and
# benchmarks into target/release is neither.
SOURCES := Cargo.toml Cargo.lock build.rs $(shell find src proto packaging/link -type f)
$(BIN)/$(SHIM): $(SOURCES)
	$(CARGO) rustc --release --bin $(SHIM) -- -C relocation-model=static -L native=packaging/link
	@headers=$$(readelf -dW $(TARGET)/release/$(SHIM)) && \
		case $$headers in *libgcc_s*|*libm.so*) echo "error: $(SHIM) needs libraries besides the C library" >&2; exit 1 ;; esac
	@install -D -m 0755 $(TARGET)/release/$(SHIM) $@
$(BIN)/$(INIT): $(SOURCES)
	$(CARGO) rustc --release --bin $(INIT) -- -C target-feature=+crt-static
	@headers=$$(readelf -lW $(TARGET)/release/$(INIT)) && \
		case $$headers in *INTERP*) echo "error: $(INIT) is not static" >&2; exit 1 ;; esac
	@install -D -m 0755 $(TARGET)/release/$(INIT) $@

demo: ## show a container through ctr and a pod through CRI (root; installs what is missing)
	@packaging/demo

test: ## run every test: unit, lifecycle, backends, a real containerd, CRI, faults (root; installs what is missing)
	@tests/run

test-node: ## run the suites in a Debian 13 with systemd, cgroup v2 and OpenZFS, in QEMU (root; installs what is missing)
	@packaging/dependencies node
	@tests/node/test
	@tests/node/test selinux
	@tests/node/try-shell

node-shell: ## boot the same node and get a shell on it, with the shim installed
	@packaging/dependencies node
	@tests/node/shell

bench: build ## measure side by side with containerd-shim-runc-v2 and LXC (root); BENCH_ARGS are handed on
	$(CARGO) bench --bench shims -- --ours $(abspath $(BIN)/$(SHIM)) $(BENCH_ARGS)

# What is already built is installed as it is, so that root needs no cargo: make build && sudo make install
# Only root reads the init: a program that its process may not read is not traced from a user namespace either.
install: $(BIN)/$(SHIM) $(BIN)/$(INIT) ## install shim, man page and examples below $(DESTDIR)$(PREFIX), /usr/local by default
	install -D -m 0755 $< $(DESTDIR)$(PREFIX)/bin/$(SHIM)
	install -D -m 0711 $(BIN)/$(INIT) $(DESTDIR)$(PREFIX)/bin/$(INIT)
	install -D -m 0644 packaging/$(SHIM).8 $(DESTDIR)$(PREFIX)/share/man/man8/$(SHIM).8
	install -d $(DESTDIR)$(EXAMPLES)
	install -m 0644 $(addprefix packaging/,config.toml containerd-v2.toml containerd-v3.toml runtimeclass.yaml) $(DESTDIR)$(EXAMPLES)

uninstall: ## remove what install has put there
	rm -f $(DESTDIR)$(PREFIX)/bin/$(SHIM) $(DESTDIR)$(PREFIX)/bin/$(INIT) $(DESTDIR)$(PREFIX)/share/man/man8/$(SHIM).8
	rm -rf $(DESTDIR)$(EXAMPLES)

clean: ## remove what was built
	$(CARGO) clean
