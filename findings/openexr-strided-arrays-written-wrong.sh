#!/usr/bin/env bash
# OpenEXR 3.5.3 (Python), NumPy 2.4.6, Linux, Python 3.11: File.write takes a NumPy array that is not contiguous. Expected:
# its pixels in the file, or an error. Seen: no error, and other pixels, although the shape is right; an image kept as
# planes and transposed to rows is such an array.
# Seen: "shape (8, 6, 3); contiguous copy: equal; transposed planes: different"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check OpenEXR==3.5.3 numpy==2.4.6

cat > try.py <<'PY'
import numpy as np
import OpenEXR

planes = np.arange(3 * 8 * 6, dtype=np.float32).reshape(3, 8, 6)
rows = planes.transpose(1, 2, 0)


def back(pixels):
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {"RGB": pixels}).write("x.exr")
    return OpenEXR.File("x.exr").channels()["RGB"].pixels


def word(found):
    return "equal" if np.array_equal(found, rows) else "different"


strided = back(rows)
print(f"shape {strided.shape}; contiguous copy: {word(back(rows.copy(order='C')))}; transposed planes: {word(strided)}")
PY
seen=$(venv/bin/python try.py)
echo "$seen"
[ "$seen" = "shape (8, 6, 3); contiguous copy: equal; transposed planes: different" ]
