#!/usr/bin/env bash
# OpenEXR 3.5.3 (Python), NumPy 2.4.6, Linux, Python 3.11: a whole number as an attribute of a file, such as the seed of an
# image. Expected: the number, or an error where it does not fit 32 bits. Seen: no error, and the number modulo 2^32 with
# the sign of its 32nd bit.
# Seen: "7 -> 7; 2**31 -> -2147483648; 2**40 -> 0"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check OpenEXR==3.5.3 numpy==2.4.6

cat > try.py <<'PY'
import numpy as np
import OpenEXR


def back(number):
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage, "seed": number}
    OpenEXR.File(header, {"RGB": np.zeros((2, 2, 3), np.float32)}).write("x.exr")
    return OpenEXR.File("x.exr").header()["seed"]


print(f"7 -> {back(7)}; 2**31 -> {back(2**31)}; 2**40 -> {back(2**40)}")
PY
seen=$(venv/bin/python try.py)
echo "$seen"
[ "$seen" = "7 -> 7; 2**31 -> -2147483648; 2**40 -> 0" ]
