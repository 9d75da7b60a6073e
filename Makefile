# The commands of the project. CONTRIBUTING.md says when to use which.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TARGET := $(or $(CARGO_TARGET_DIR),target)
CARGO_DENY_VERSION := 0.20.2
CARGO_DENY := $(TARGET)/tools/cargo-deny-$(CARGO_DENY_VERSION)/bin/cargo-deny
# Time for the advisory database to arrive before it is taken to be out of reach.
ADVISORIES_TIMEOUT_S := 60

.PHONY: help setup build compare aa readme test test-kernels soak miri bench check lint fmt clippy deny clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing (Debian 12, root); PEERS=1: Envoy and HAProxy too
	@scripts/setup.sh $(if $(filter-out 0,$(PEERS)),--peers)

build: setup ## build every program in release mode
	cargo build --release --workspace --bins

# QUICK=1: in under 3 minutes. PEERS=1: with Envoy, HAProxy and the conventional proxy.
compare: build ## compare the redirection paths in the two-node lab; QUICK=1, PEERS=1
	$(TARGET)/release/lab compare $(if $(filter-out 0,$(QUICK)),--quick) \
	    $(if $(filter-out 0,$(PEERS)),--peer all) $(ARGS)

aa: build ## measure a path against itself: how often a difference is seen where there is none; QUICK=1
	$(TARGET)/release/lab compare --paths ebpf,ebpf \
	    $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

readme: ## put the newest results into the README
	cargo build --release -p lab-cli
	$(TARGET)/release/lab report --readme README.md

test: ## run every test, network ones included
	@scripts/setup.sh --best-effort --tests
	@scripts/test.sh

# Debian's kernels in virtual machines: docs/kernels.md. KERNELS="5.10 6.1 6.12".
test-kernels: ## test redirection on Linux 6.1 under QEMU; KERNELS="5.10 6.1 6.12"
	@scripts/setup.sh --kernels
	@KERNELS="$(or $(KERNELS),6.1)" scripts/kernels/run.sh

soak: ## what takes long: a million connections, all attacks, minutes of silence, an hour of fuzzing
	RT_SOAK_CONNECTIONS=1000000 cargo test -p rt --release --test soak
	cargo test -p redirect --release --test redirection -- a_thousand_pods --ignored --nocapture
	cargo build --release -p ztunnel -p node-agent -p loadgen -p lab-cli --bins
	$(TARGET)/release/lab attack all
	LAB_HANDOVERS=20 LAB_BIN_DIR=$(abspath $(TARGET))/release cargo test -p lab --release \
	    --test handover -- --nocapture
	cargo test -p proxy --release --lib -- silent_tunnels_live_for_five_minutes --ignored --test-threads 1
	cargo test -p proxy --release --lib -- waits_for_seventy_seconds --ignored
	PROXY_FUZZ_SECONDS=3600 cargo test -p proxy --release --lib -- whole_tunnels --nocapture

miri: ## optional, with a nightly compiler: rt under Miri and AddressSanitizer
	@scripts/miri.sh

bench: setup ## run every micro-benchmark; BENCH_QUICK=1 in under 3 minutes after the build
	rm -rf $(TARGET)/bench-parts
	cargo bench -p benches $(ARGS)
	$(TARGET)/release/bench-table

check: ## before every commit, in under a minute: fmt, house rules, clippy of changed crates; BASE=main
	@scripts/check.sh

lint: setup fmt clippy deny ## formatting, clippy and BPF warnings as errors, dependencies

fmt:
	cargo fmt --all --check

# Builds the BPF programs too, whose warnings are errors in bpf/redirect/build.rs.
clippy:
	cargo clippy --workspace --all-targets --features ztunnel/slowdown -- -D warnings

deny: $(CARGO_DENY)
	$(CARGO_DENY) --locked check --hide-inclusion-graph bans licenses sources
	@if timeout $(ADVISORIES_TIMEOUT_S) $(CARGO_DENY) --locked fetch db >/dev/null 2>&1; then \
	    $(CARGO_DENY) --locked check --hide-inclusion-graph --disable-fetch advisories; \
	else \
	    echo "lint: advisories skipped: their database cannot be fetched from here"; \
	fi

$(CARGO_DENY):
	cargo install --quiet --locked --root $(TARGET)/tools/cargo-deny-$(CARGO_DENY_VERSION) \
	    cargo-deny@$(CARGO_DENY_VERSION)

clean: ## remove what was built
	cargo clean
