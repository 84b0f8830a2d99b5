# hythe: what there is to do. Everything is one command; `make` alone lists them.

SEEDS ?= 10000
PREFIX ?= /usr/local
# Most of the time these tests wait, for minutes some of them.
NAMESPACE_THREADS = --test-threads 4
VM_THREADS = --test-threads 4
# Each of these has an Engine of its own.
DOCKER_THREADS = --test-threads 3
# What a failed test says of itself, of hythe and of its guest is enough; `make … RUST_BACKTRACE=1` says more.
export RUST_BACKTRACE = 0
FUZZ_SECONDS ?= 60
# How libFuzzer sees where an input leads: a pass of LLVM's, which stable Rust has.
FUZZ_FLAGS = -C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=4 \
	-C llvm-args=-sanitizer-coverage-inline-8bit-counters -C llvm-args=-sanitizer-coverage-pc-table \
	-C llvm-args=-sanitizer-coverage-trace-compares
# Named, so that build scripts are built without those.
FUZZ_TARGET = $(shell rustc -vV | sed -n 's/^host: //p')

.DEFAULT_GOAL := help
.PHONY: help build demo test check format lint unit loom sim fuzz kernel instructions namespace vm docker bench perf flamegraph install clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build the release binaries: target/release/hythe, and hythe-docker-proxy beside it
	cargo build --release --locked

demo: build ## A web server in a guest, reached from the host, and the host from the guest
	tests/setup demo
	tests/demo target/release/hythe

test: ## Everything that must pass (installs what the tests need; takes root)
	tests/setup
	$(MAKE) --no-print-directory format lint loom sim SEEDS=300
	cargo test --locked --lib --bins --test architecture --test bulk --test kernel
	$(MAKE) --no-print-directory instructions
	tests/demo target/debug/hythe
	cargo test --locked --test namespace -- $(NAMESPACE_THREADS)
	tests/guest/build
	cargo test --locked --test vm -- $(VM_THREADS)
	cargo test --locked --test docker -- $(DOCKER_THREADS)

check: format lint unit ## Format, lints and unit tests: the quick round

format:
	cargo fmt --check

lint:
	cargo clippy --locked --all-targets --features sim -- -D warnings

unit: ## Unit tests, and what bulk copies and allocates
	cargo test --locked --lib --bins --test bulk

loom: ## Every interleaving of the flow table's and the mailboxes' threads
	cargo test --locked --features loom --lib loom_tests

sim: ## The simulation, over many seeds (SEEDS=10000; HYTHE_SEED=n replays one)
	HYTHE_SEEDS=$(SEEDS) cargo test --locked --features sim --test sim

fuzz: ## The path of a name, against bytes that nobody has thought of (FUZZ_SECONDS=60; not in `make test`)
	tests/setup fuzz
	RUSTFLAGS='$(FUZZ_FLAGS)' cargo build --locked --release --manifest-path tests/fuzz/Cargo.toml \
		--target $(FUZZ_TARGET) --target-dir target/fuzz
	mkdir -p target/fuzz/corpus
	target/fuzz/$(FUZZ_TARGET)/release/dns -max_total_time=$(FUZZ_SECONDS) -max_len=2048 -timeout=10 -rss_limit_mb=512 \
		-artifact_prefix=target/fuzz/ target/fuzz/corpus tests/fuzz/seeds

kernel: ## What is relied on of the kernel
	cargo test --locked --test kernel

instructions: ## No step of a frame's path takes more instructions than before
	tests/setup instructions
	cargo build --locked --release --example steps
	perf/instructions

namespace: ## hythe as a whole, between namespaces (takes root)
	tests/setup namespace
	cargo test --locked --test namespace -- $(NAMESPACE_THREADS)

vm: ## hythe with real guests: User-Mode Linux and QEMU (takes root)
	tests/setup vm
	tests/guest/build
	cargo test --locked --test vm -- $(VM_THREADS)

docker: ## hythe with real Docker Engines in a guest (takes root)
	tests/setup docker
	cargo test --locked --test docker -- $(DOCKER_THREADS)

bench: ## Criterion benchmarks
	cargo bench --locked

perf: ## hythe beside its peers and the kernel's own bounds (takes root)
	perf/setup
	cargo build --locked --release --bins --examples
	perf/compare

flamegraph: ## Where the time goes, as pictures (takes root)
	perf/setup
	cargo build --locked --release --bins --examples
	perf/flamegraph

install: build ## Install to $(PREFIX)/bin
	install -D -m 0755 target/release/hythe $(DESTDIR)$(PREFIX)/bin/hythe
	install -D -m 0755 target/release/hythe-docker-proxy $(DESTDIR)$(PREFIX)/bin/hythe-docker-proxy

clean: ## Remove what was built
	cargo clean
