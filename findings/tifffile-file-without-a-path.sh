#!/usr/bin/env bash
# tifffile 2026.3.3, NumPy 2.4.6, Linux, Python 3.11: imwrite documents that it takes an open binary file. Expected: so
# does one that `os.fdopen` made of a descriptor, as of a temporary file. Seen: a TypeError, because the name of such a
# file is a number, and tifffile takes it for a path; a BytesIO, which has no name at all, is taken.
# Seen: "open(): written; BytesIO: written; os.fdopen(): TypeError"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check tifffile==2026.3.3 numpy==2.4.6

cat > try.py <<'PY'
import io
import os
from pathlib import Path

import numpy as np
import tifffile

pixels = np.zeros((4, 4, 3), np.uint8)


def outcome(file):
    try:
        with file:
            tifffile.imwrite(file, pixels, photometric="rgb")
    except TypeError as error:
        return type(error).__name__
    return "written"


handle = os.open("b.tif", os.O_RDWR | os.O_CREAT)
found = outcome(Path("a.tif").open("wb")), outcome(io.BytesIO()), outcome(os.fdopen(handle, "wb"))
print("open(): {}; BytesIO: {}; os.fdopen(): {}".format(*found))
PY
seen=$(venv/bin/python try.py)
echo "$seen"
[ "$seen" = "open(): written; BytesIO: written; os.fdopen(): TypeError" ]
