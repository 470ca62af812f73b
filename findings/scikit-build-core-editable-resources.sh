#!/usr/bin/env bash
# scikit-build-core 1.1.2, Python 3.11, editable install (redirect mode) of a package with a second folder mapped into it:
# `importlib.resources.files(package)` is a multiplexed path of scikit-build-core. Expected: a path, as for the same
# package without the mapping, or at least one whose text names a folder. Seen: its text is the repr of two folders,
# so `Path(str(files(package)))` exists nowhere, and `rglob` on it finds no file and raises nothing.
# Seen: "plain: PosixPath, 1 file(s); mapped: _SkbuildMultiplexedPath, 0 file(s)"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check scikit-build-core==1.1.2

for name in plain mapped; do
    mkdir -p "$name/src/$name" "$name/data"
    touch "$name/src/$name/__init__.py" "$name/data/data.txt"
    {
        echo '[build-system]'
        echo 'requires = ["scikit-build-core==1.1.2"]'
        echo 'build-backend = "scikit_build_core.build"'
        echo '[project]'
        echo "name = \"$name\""
        echo 'version = "1"'
        echo '[tool.scikit-build]'
        echo 'wheel.cmake = false'
        echo '[tool.scikit-build.wheel.packages]'
        echo "$name = \"src/$name\""
        [ "$name" = plain ] || echo '"mapped/data" = "data"'
    } >"$name/pyproject.toml"
    venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation -e "./$name"
done

seen=$(venv/bin/python - <<'PY'
from importlib.resources import files
from pathlib import Path

parts = []
for name in ("plain", "mapped"):
    found = files(name)
    parts.append(f"{name}: {type(found).__name__}, {len(list(Path(str(found)).rglob('*.py')))} file(s)")
print("; ".join(parts))
PY
)
echo "$seen"
[ "$seen" = "plain: PosixPath, 1 file(s); mapped: _SkbuildMultiplexedPath, 0 file(s)" ]
