# SPDX-License-Identifier: MIT
# make help lists the targets. Everything is set up in .venv by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard csrc/*.h csrc/*.py csrc/*/*.c csrc/*/*.h) setup.py pyproject.toml
# What a build needs, and the peers that the tests and benchmarks run against.
BUILD_PACKAGES := gcc python3-dev python3-venv libc6-dev
PEER_PACKAGES := curl fdisk qemu-utils libnbd-bin nbdkit fio libvhdi-utils e2fsprogs fuse3 \
	mount xfsprogs btrfs-progs ntfs-3g dosfstools
# What the tests of mounting boot: a kernel with programs of this machine in QEMU.
GUEST_PACKAGES := qemu-system-x86 nbd-client busybox-static kmod
# What only benchmarks need: qemu-storage-daemon.
BENCH_PACKAGES := qemu-system-common
# What only the suites of libnbd and nbd need, which are fetched and built (make interop).
INTEROP_PACKAGES := make pkg-config dpkg-dev libxml2-dev libglib2.0-dev jq bsdextrautils iproute2
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup packages peers demo test lint unit soak fuzz interop bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

packages: ## install the Debian packages of a build, where missing
	@sh tests/install_packages.sh $(BUILD_PACKAGES)

peers: packages ## install the peers of the tests and benchmarks, where missing
	@sh tests/install_packages.sh $(PEER_PACKAGES) $(GUEST_PACKAGES)

$(STAMP): $(SOURCES) | packages
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check 'setuptools>=80,<90' 'cffi>=2.0,<3' --group test --group lint --group build --group peers --group plot
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-build-isolation --editable .
	touch $@

setup: $(STAMP) ## the virtual environment, with the C part built

demo: $(STAMP) peers ## the main job on real input: create, serve, mkfs, read back, convert
	$(BIN)/python tests/demo.py

lint: $(STAMP) ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

unit: $(STAMP) peers
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test: lint unit ## everything that must pass, C unit tests under sanitizers included

soak: $(STAMP) peers ## the long forms: kills, crash states, models, fio
	$(BIN)/python -m pytest -m soak -n 0

fuzz: $(STAMP) ## fuzz the open path and the NBD parsers, 10 minutes each (SECONDS=600)
	$(BIN)/python -m tests.fuzz all --seconds $(or $(SECONDS),600)

interop: $(STAMP) peers ## other people's suites against us: libnbd's, and nbd's
	@sh tests/install_packages.sh $(INTEROP_PACKAGES)
	$(BIN)/python -m tests.interop .interop

bench: $(STAMP) peers ## benchmarks against the peers; report in bench/results
	@sh tests/install_packages.sh $(BENCH_PACKAGES)
	$(BIN)/python -m bench nbd
	$(BIN)/python -m bench api
	$(BIN)/python -m bench stall
	$(BIN)/python -m bench chain
	$(BIN)/python -m bench convert
	$(BIN)/python -m bench qos
	$(BIN)/python -m bench start
	$(BIN)/python -m bench mount

clean: ## remove what was built
	rm -rf $(VENV) .interop .kernel build dist *.egg-info vhdx/plane/*.so
