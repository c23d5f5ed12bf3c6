# `make help` lists the targets. Everything is made below .venv/ and build/.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build

# What runs VMs and keeps their states, and what builds their images.
PACKAGES := python3-venv qemu-system-x86 qemu-utils zstd mmdebstrap e2fsprogs lz4 cpio uidmap \
    mtools dosfstools syslinux syslinux-common systemd-boot-efi
# What tests and benchmarks need besides: the BOINC client and its library, external brokers, their certificates,
# a browser, Prometheus, cctools, UEFI firmware, containers, ssh, wine.
TEST_PACKAGES := boinc-client libboinc-app7 openssl activemq libxstream-java libjettison-java libxpp3-java rabbitmq-server \
    chromium fonts-dejavu-core prometheus coop-computing-tools ovmf umoci skopeo openssh-client openssh-server wine64

export VMWRAPPER_IMAGES := $(CURDIR)/$(BUILD)/images

.PHONY: help example example-seed-2009 test test-virtualbox test-virtualbox-long test-virtualbox-host lint bench
.PHONY: bench-monitor bundle bundle-windows fuzz chaos chaos-boinc
.PHONY: image setup clean test-inits test-scientific
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 28

setup: $(VENV)/ready ## install what is needed: packages, the Python environment

$(VENV)/ready: lock/dev.txt pyproject.toml tools/install-packages Makefile
	@tools/install-packages $(PACKAGES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "making the Python environment $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement lock/dev.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/peers: $(VENV)/ready
	@tools/install-packages $(TEST_PACKAGES)
	@touch $@

image: $(VENV)/ready ## build the default guest image (quick when nothing has changed)
	@$(BIN)/vmctl image build --output $(BUILD)/images

example: image ## run the worker example in a virtual machine
	@$(BIN)/python tools/run_example.py --slot $(BUILD)/example-slot

example-seed-2009: image $(VENV)/peers ## run the worker example of 2009 as its slides print it, with a real ActiveMQ
	@$(BIN)/python tools/run_seed_2009.py --slot $(BUILD)/seed-2009-slot

bundle: image ## make a BOINC application version of the worker example, in build/bundle
	@rm -rf $(BUILD)/bundle
	@$(BIN)/vmctl bundle examples/worker --input worker-input.tar --project $(BUILD)/bundle $(BUNDLE_ARGS)

bundle-windows: $(VENV)/peers ## the same for Windows, in build/bundle-windows: frozen under wine, without an image
	@rm -rf $(BUILD)/bundle-windows $(BUILD)/frozen-windows
	@$(BIN)/python -m tests.windows.frozen $(BUILD)/frozen-windows
	@$(BIN)/vmctl bundle examples/worker --input worker-input.tar --project $(BUILD)/bundle-windows \
	    --platform windows_x86_64 --frozen $(BUILD)/frozen-windows --no-image $(BUNDLE_ARGS)

test: image $(VENV)/peers ## run all tests, with real virtual machines
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-virtualbox: $(VENV)/ready ## test beside a real VirtualBox 7.2, without its kernel driver, in a chroot
	@$(BIN)/python -m tests.virtualbox.chroot python3 -m pytest -p no:cacheprovider tests/virtualbox $(PYTEST_ARGS)

test-virtualbox-long: $(VENV)/ready ## its long form: 100 cycles of a VM's life, and a minute's CPU time
	@VMWRAPPER_LONG=1 $(BIN)/python -m tests.virtualbox.chroot \
	    python3 -m pytest -p no:cacheprovider tests/virtualbox/test_cycles.py -s $(PYTEST_ARGS)

test-virtualbox-host: $(VENV)/ready ## test with this host's own VirtualBox and its kernel driver (not run in CI)
	@VMWRAPPER_VIRTUALBOX=host $(BIN)/python -m pytest tests/virtualbox $(PYTEST_ARGS)

test-inits: $(VENV)/peers ## the agent as a service of System V's init and OpenRC (minutes, emulated; not run in CI)
	@$(BIN)/python -m pytest tests/vm/inits.py -s $(PYTEST_ARGS)

test-scientific: $(VENV)/peers ## the recipe debian-scientific: build it, and use NumPy and SciPy (minutes; not run in CI)
	@$(BIN)/python -m pytest tests/vm/scientific.py -s $(PYTEST_ARGS)

lint: $(VENV)/ready ## ruff and mypy --strict
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

chaos: $(VENV)/peers ## 2,000 commands and 400 copies on each broker, while everything is killed 200 times
	@$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

chaos-checkpoint: image $(VENV)/peers ## one checkpointed job in a VM, while its processes are killed 100 times at random
	@$(BIN)/python -m tests.vm.chaos_checkpoint $(CHAOS_ARGS)

chaos-boinc: $(VENV)/peers ## fifty random restarts and kills of a BOINC client and of the wrapper, during one job
	@VMWRAPPER_CHAOS=50 $(BIN)/python -m pytest -s tests/boinc/test_restarts.py -k random

bench: image $(VENV)/peers ## measure everything that benchmarks/ can, beside its peers (half an hour)
	@$(BIN)/python -m benchmarks all $(BENCH_ARGS)

bench-monitor: $(VENV)/peers ## the monitor with 1,000 guests and 100 events a second, for a minute
	@$(BIN)/python -m benchmarks monitor

bench-guard: image ## short benchmarks beside their recorded values; fails when one has become much worse
	@$(BIN)/python -m benchmarks.guard

FUZZ_SECONDS ?= 600
fuzz: $(VENV)/ready ## fuzz everything that reads others' bytes, FUZZ_SECONDS (600) for each
	@for target in frames messages manifest job; do \
	    $(BIN)/python -m tests.fuzz $$target --seconds $(FUZZ_SECONDS) || exit 1; done

clean: ## remove what was built (not the Python environment)
	rm -rf $(BUILD)
