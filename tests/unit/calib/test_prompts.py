from __future__ import annotations

from pathlib import Path

import pytest

from l2p_calib.prompts import numbered_prompts, read_prompts
from l2p_runtime.errors import UsageError


def test_the_packages_own_prompts() -> None:
    prompts = read_prompts()
    assert len(prompts) == len(set(prompts)) >= 32
    assert not any(prompt.startswith("#") for prompt in prompts)
    text = (Path(__file__).parents[3] / "calib/l2p_calib/data/prompts.txt").read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("# mine\n\n a cat \na dog\na cat\n", encoding="utf-8")
    assert read_prompts(path) == ("a cat", "a dog", "a cat")
    path.write_bytes(b"a\r\nb")
    assert read_prompts(path) == ("a", "b")
    with pytest.raises(UsageError, match="has 4 bytes, expected at most 3"):
        read_prompts(path, 3)


@pytest.mark.parametrize("character", "\u2028\u2029\x85\x0b\x0c\x1c")
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_only_newlines_separate_prompts(tmp_path: Path, character: str, mark: bytes) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(mark + f"# mine\na{character}cat\r\na dog\n".encode())
    assert read_prompts(path) == (f"a{character}cat", "a dog")
    assert numbered_prompts(path) == ((2, f"a{character}cat"), (3, "a dog"))


@pytest.mark.parametrize("data", [b"a cat\ra dog\r", b"a cat\ra dog\n"])
def test_a_carriage_return_inside_a_prompt_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\n" + data)
    with pytest.raises(UsageError, match="line 2 has a carriage return inside a prompt"):
        read_prompts(path)


@pytest.mark.parametrize(("data", "needle"), [(b"", "holds no prompt"), (b"# x\n", "holds no"), (b"\xff", "not UTF-8")])
def test_a_file_without_prompts(tmp_path: Path, data: bytes, needle: str) -> None:
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(UsageError, match=needle):
        read_prompts(tmp_path / "p.txt")
    for path in (tmp_path / "q.txt", tmp_path):
        with pytest.raises(UsageError, match="cannot read prompts from"):
            read_prompts(path)
