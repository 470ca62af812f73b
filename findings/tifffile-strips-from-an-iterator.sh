#!/usr/bin/env bash
# tifffile 2026.3.3, numpy 2.4.6, Python 3.11: `TiffWriter.write` of an iterator of bands of 64 rows with `shape`, `dtype`,
# `rowsperstrip=64` and `compression="zlib"`. Expected: a strip per band, as the same bands make tiles with
# `tile=(64, width)`. Seen: ValueError, because the first band is reshaped to the whole image.
# Seen: "tiles: equal; strips: ValueError: cannot reshape array of size 18432 into shape (1,1,128,96,3)"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check tifffile==2026.3.3 numpy==2.4.6

seen=$(venv/bin/python - <<'PY'
import numpy as np
import tifffile

image = np.random.default_rng(0).integers(0, 65536, (128, 96, 3), dtype=np.uint16)
found = []
for name, options in {"tiles": {"tile": (64, 96)}, "strips": {"rowsperstrip": 64}}.items():
    bands = (image[row : row + 64] for row in range(0, 128, 64))
    try:
        with tifffile.TiffWriter("x.tif") as writer:
            writer.write(
                bands, shape=image.shape, dtype=image.dtype, photometric="rgb", compression="zlib", metadata=None, **options
            )
        said = "equal" if np.array_equal(tifffile.imread("x.tif"), image) else "wrong"
    except ValueError as error:
        said = f"ValueError: {error}"
    found.append(f"{name}: {said}")
print("; ".join(found))
PY
)
echo "$seen"
[ "$seen" = "tiles: equal; strips: ValueError: cannot reshape array of size 18432 into shape (1,1,128,96,3)" ]
