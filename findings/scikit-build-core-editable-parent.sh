#!/usr/bin/env bash
# scikit-build-core 1.1.2, Python 3.11, editable install (redirect mode) of a package with a second folder mapped into
# a folder below it ("mapped/data/files" = "more/files"). Expected: the .pth file lists the folders that hold packages, as
# for the same package without the mapping. Seen: it also lists the parent of the project's own folder, so whatever lies
# beside the clone can be imported: here a folder `neighbour`, as a namespace package.
# Seen: "plain: 1 path(s), neighbour: no; mapped: 2 path(s), neighbour: yes"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
result=""
for name in plain mapped; do
    mkdir -p "$name/neighbour" "$name/clone/src/$name" "$name/clone/more/files"
    touch "$name/clone/src/$name/__init__.py" "$name/clone/more/files/data.txt"
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
        [ "$name" = plain ] || echo '"mapped/data/files" = "more/files"'
    } >"$name/clone/pyproject.toml"
    ${PYTHON:-python3.11} -m venv "$name/venv"
    "$name/venv/bin/pip" install --quiet --disable-pip-version-check scikit-build-core==1.1.2
    "$name/venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation --editable "$name/clone"
    paths=$(grep -c "^$work" "$name"/venv/lib/python3*/site-packages/_editable_*.pth)
    found=$("$name/venv/bin/python" -c 'import importlib.util as u; print("yes" if u.find_spec("neighbour") else "no")')
    result="$result${result:+; }$name: $paths path(s), neighbour: $found"
done

echo "$result"
[ "$result" = "plain: 1 path(s), neighbour: no; mapped: 2 path(s), neighbour: yes" ]
