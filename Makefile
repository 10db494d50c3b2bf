# The commands of this project; `make` alone lists them.
SHELL   := /bin/bash
PREFIX  ?= /usr/local
DESTDIR ?=
CARGO   ?= cargo
TARGET  := $(or $(CARGO_TARGET_DIR),target)
SHIM    := containerd-shim-proxmox-lxcri-v1

.DEFAULT_GOAL := help
.PHONY: help build demo test bench install clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

build: ## build the release of the shim
	$(CARGO) build --release --bin $(SHIM)

demo: ## show a container through ctr and a pod through CRI (root; installs what is missing)
	@packaging/demo

test: ## run every test: unit, lifecycle, backends, a real containerd, CRI, faults (root)
	@tests/run

bench: ## measure side by side with containerd-shim-runc-v2 (root); BENCH_ARGS are handed on
	$(CARGO) build --release --bin $(SHIM)
	$(CARGO) bench --bench shims -- $(BENCH_ARGS)

install: $(TARGET)/release/$(SHIM) ## install the shim into $(DESTDIR)$(PREFIX)/bin
	install -D -m 0755 $(TARGET)/release/$(SHIM) $(DESTDIR)$(PREFIX)/bin/$(SHIM)

$(TARGET)/release/$(SHIM):
	$(MAKE) build

clean: ## remove what was built
	$(CARGO) clean
