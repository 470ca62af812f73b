#!/usr/bin/env bash
# onnxruntime 1.31.1, Linux, Python 3.11: the library writes an identifier of the machine under ~/.cache when it is
# imported, unless ORT_DISABLE_TELEMETRY is set. Expected: the same files wherever that switch is not set. Seen: with
# CI=true in the environment it writes none, so a test that looks for them sees another library in CI than its users do.
# Seen: "plain: 2 file(s); CI=true: 0 file(s); ORT_DISABLE_TELEMETRY=1: 0 file(s)"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check onnxruntime==1.31.1

count() {
    mkdir -p "$1"
    env -i PATH="$PATH" HOME="$work/$1" "${@:2}" "$work/venv/bin/python" -c 'import onnxruntime, time; time.sleep(3)' 2>/dev/null
    find "$1" -path '*onnxruntime*' -type f | wc -l
}

seen="plain: $(count a) file(s); CI=true: $(count b CI=true) file(s); ORT_DISABLE_TELEMETRY=1: $(count c ORT_DISABLE_TELEMETRY=1) file(s)"
echo "$seen"
[ "$seen" = "plain: 2 file(s); CI=true: 0 file(s); ORT_DISABLE_TELEMETRY=1: 0 file(s)" ]
