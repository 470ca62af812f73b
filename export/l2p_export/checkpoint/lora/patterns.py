"""Matches module names against the keys of PEFT's `alpha_pattern` and `rank_pattern`.

A key is a regular expression that has to match the whole name or the end of it behind a dot, and the first key that
matches decides. Keys come from strangers, and Python cannot stop a match that backtracks for ever. So a key that
repeats or branches is tried in a process of its own, which can be ended.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from l2p_runtime.errors import ArtifactError

_KEYS_MAX = 4096
_KEY_LENGTH_MAX = 1000
_SECONDS = 10.0

# A name, perhaps anchored: it matches in linear time. A dot stands for any character, as in every regular expression.
_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[.-])*\$?")

# For each key one line before it is tried, and one of what it matches.
_CHILD = """
import json, re, resource, sys, warnings
warnings.simplefilter("ignore")
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
keys, names = json.load(sys.stdin)
for key in keys:
    print(flush=True)
    try:
        pattern = re.compile(rf"(.*\\.)?({key})$")
        print(json.dumps([name for name in names if pattern.match(name)]), flush=True)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        print(json.dumps(str(error)), flush=True)
"""


def first_matches(keys: Sequence[str], names: Iterable[str], what: str, path: Path) -> dict[str, str]:
    """For each name that any key matches, the first key that does.

    Args:
        keys: regular expressions, in the order of the file.
        names: names of modules, as PEFT knew them.
        what: the setting that the keys are of, as `alpha_pattern`, for messages.
        path: the file that they are from, for messages.

    Raises:
        ArtifactError: a key is no regular expression, is too long, or takes too long; or there are too many.
    """
    if len(keys) > _KEYS_MAX:
        raise ArtifactError(f"`{path}` has {len(keys)} keys in {what}, expected {_KEYS_MAX} at most")
    long = next((key for key in keys if len(key) > _KEY_LENGTH_MAX), None)
    if long is not None:
        raise ArtifactError(
            f"`{path}` has the {what} key {long[:60]!a}... of {len(long)} characters, at most {_KEY_LENGTH_MAX}"
        )
    names = sorted(set(names))
    others = [key for key in keys if not _PLAIN.fullmatch(key)]
    matched = dict(zip(others, _matched_apart(others, names, what, path), strict=True))
    found: dict[str, str] = {}
    for key in keys:
        for name in matched[key] if key in matched else _matched(key, names):
            found.setdefault(name, key)
    return found


def _matched(key: str, names: Sequence[str]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pattern = re.compile(rf"(.*\.)?({key})$")
    return [name for name in names if pattern.match(name)]


def _matched_apart(keys: Sequence[str], names: Sequence[str], what: str, path: Path) -> list[list[str]]:
    """The names that each key matches, found by another Python, which is ended if it takes too long."""
    if not keys:
        return []
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    try:
        run = subprocess.run(  # noqa: S603 - our own script; the keys are its data
            command, input=json.dumps([keys, names]).encode(), capture_output=True, timeout=_SECONDS, check=False
        )
        lines = run.stdout.splitlines()
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").splitlines()
    answers = [json.loads(line) for line in lines[1::2]]
    for key, answer in zip(keys, answers, strict=False):
        if isinstance(answer, str):
            raise ArtifactError(
                f"`{path}` has the {what} key {key!a}, which is no regular expression: {answer}",
                hint="PEFT matches such keys against the names of layers: write the name of a layer, or its end",
            )
    if len(answers) < len(keys):
        raise ArtifactError(
            f"`{path}` has the {what} key {keys[len(answers)]!a}, a regular expression that was not matched within "
            f"{_SECONDS:g} s",
            hint="write the name of each layer, or its end, instead",
        )
    return answers
