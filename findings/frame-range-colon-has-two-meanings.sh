#!/usr/bin/env bash
# openjd-model 0.13.0, fileseq 3.4.0 and FileSequence of opencue-pycue 1.37.0, Python 3.11: the frame range 1-10:3.
# Expected: the same frames in tools of one farm, or an error in one of them. Seen: every third frame in Open Job
# Description, all ten in the others, where the colon orders frames from coarse to fine.
# Seen: "openjd: 1,4,7,10; fileseq: 1,4,7,10,3,5,9,2,6,8; opencue: 1,4,7,10,2,3,5,6,8,9"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check openjd-model==0.13.0 fileseq==3.4.0 opencue-pycue==1.37.0

seen=$(venv/bin/python - <<'PY'
import fileseq
from FileSequence import FrameSet
from openjd.model import IntRangeExpr

text = "1-10:3"
found = {
    "openjd": IntRangeExpr.from_str(text),
    "fileseq": fileseq.FrameSet(text),
    "opencue": FrameSet(text).getAll(),
}
print("; ".join(f"{name}: {','.join(map(str, frames))}" for name, frames in found.items()))
PY
)
echo "$seen"
[ "$seen" = "openjd: 1,4,7,10; fileseq: 1,4,7,10,3,5,9,2,6,8; opencue: 1,4,7,10,2,3,5,6,8,9" ]
