#!/usr/bin/env bash
# opencue-pyoutline 1.37.0, opencue-pycue 1.37.0, Python 3.11: installed into a new environment, then a job is serialized
# as the documentation shows. Expected: what it imports is among its requirements. Seen: its backend imports `packaging`,
# which nothing requires. With `packaging` installed by hand it works.
# Seen: "without: No module named 'packaging'; with: <spec>"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check opencue-pyoutline==1.37.0 opencue-pycue==1.37.0

cat >job.py <<'PY'
import outline
from outline.cuerun import OutlineLauncher
from outline.modules.shell import Shell

job = outline.Outline("a_job", show="show", shot="shot", user="user")
job.add_layer(Shell("render", command=["true"], range="1-10"))
launcher = OutlineLauncher(job)
job.setup()
text = launcher.serialize(use_pycuerun=False)
print(text[text.index("<spec>") :][:6])
PY
export HOME=$work
without=$( (venv/bin/python job.py 2>&1 || true) | tail -1 | grep -o 'No module named .*')
venv/bin/pip install --quiet --disable-pip-version-check packaging
seen="without: $without; with: $(venv/bin/python job.py)"
echo "$seen"
[ "$seen" = "without: No module named 'packaging'; with: <spec>" ]
