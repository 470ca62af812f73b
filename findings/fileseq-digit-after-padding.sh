#!/usr/bin/env bash
# fileseq 2.3.2, 3.1.0 and 3.4.0, Python 3.11: the sequence "shot_1-5#_4k.exr", with a digit in what follows the padding.
# Expected: five frames, as in version 2, or an error. Seen: versions 3.2 to 3.4 take it for one plain file, with no error,
# so that a missing resolution of a name makes a sequence of one.
# Seen: "2.3.2: 5 frame(s); 3.1.0: ParseException; 3.4.0: 1 frame(s)"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv

seen=""
for version in 2.3.2 3.1.0 3.4.0; do
    venv/bin/pip install --quiet --disable-pip-version-check fileseq==$version
    found=$(venv/bin/python - <<'PY'
import fileseq

try:
    print(f"{len(fileseq.FileSequence('shot_1-5#_4k.exr'))} frame(s)")
except Exception as error:
    print(type(error).__name__)
PY
    )
    seen="$seen${seen:+; }$version: $found"
done
echo "$seen"
[ "$seen" = "2.3.2: 5 frame(s); 3.1.0: ParseException; 3.4.0: 1 frame(s)" ]
