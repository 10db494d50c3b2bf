#!/bin/sh
# Builds one fuzz target with coverage feedback, on a stable toolchain, and runs it: run.sh TARGET [libFuzzer option or input]...
set -eu
cd "$(dirname "$0")"
target=${1:?usage: run.sh TARGET [libFuzzer option or input]...}
shift
host=$(rustc -vV | sed -n 's/^host: //p')
# What cargo-fuzz passes, less the sanitizer. --target keeps the flags away from build scripts.
RUSTFLAGS="--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares" \
    cargo build --target "$host" --bin "$target"
mkdir -p "corpus/$target" "artifacts/$target"
exec "target/$host/debug/$target" -artifact_prefix="artifacts/$target/" -rss_limit_mb=512 -timeout=5 "$@" "corpus/$target"
