"""What comments, docstrings and pages cite exists in this repository: pages, headings, files and links."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Pages of notes that are not part of this repository, and the folder that they were kept in.
FOREIGN = re.compile(
    r"\bdesign sections?\s+\d|\b(?:l2p|tensorrt|landscape|triton|style)\.md\b|\bshared/\w", re.IGNORECASE
)
QUOTED = re.compile(r'\b([\w-]+)\.md(?:\]\([^)\s]*\))?,((?:(?:\s|,|and)*\s"[^"]+")+)')
LINE_BREAK = re.compile(r"[ \t]*\n[ \t]*(?:(?:#|//|\*)[ \t]*)?")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|cpp|cu|toml))`")


def test_no_file_cites_a_page_outside_the_repository() -> None:
    assert not [f"{name}: {match[0]}" for name, text in _texts() for match in FOREIGN.finditer(text)]


def test_cited_headings_exist() -> None:
    found = [(name, page, heading) for name, text in _texts() for page, heading in _citations(text)]
    assert len(found) > 50
    assert not [cited for cited in found if cited[2] not in _headings(cited[1])]


@pytest.mark.parametrize(
    ("text", "cited"),
    [
        ('(docs/model.md, "Pixel head").', ["model: Pixel head"]),
        (
            '# docs/design.md,\n    # "Words", "Networks"\n    # and "Bundle".',
            ["design: Words", "design: Networks", "design: Bundle"],
        ),
        ('[model.md](model.md), "Text\nencoder", says "no"', ["model: Text encoder"]),
        ('docs/engines.md says "no"', []),
    ],
)
def test_citations_are_found(text: str, cited: list[str]) -> None:
    assert [f"{page}: {heading}" for page, heading in _citations(_joined(text))] == cited


def test_paths_in_the_design_exist() -> None:
    """A file's path may leave out its first folders while it stays the only one of that name."""
    files = _tracked()
    folders = {parent.as_posix() for name in files for parent in Path(name).parents}
    paths = set(PATH.findall((ROOT / "docs/design.md").read_text()))
    assert len(paths) > 50
    for path in sorted(paths):
        known = folders if path.endswith("/") else files
        matches = [name for name in known if f"/{name}".endswith(f"/{path.rstrip('/')}")]
        assert len(matches) == 1 or path in known or (matches and known is folders), (
            f"`{path}` is {matches or 'nothing'}"
        )


def test_relative_links_lead_somewhere() -> None:
    pages = [name for name in _tracked() if name == "README.md" or re.fullmatch(r"docs/[^/]+\.md", name)]
    assert len(pages) > 5
    for page in pages:
        for link in LINK.findall((ROOT / page).read_text()):
            if not re.match(r"\w+:|#", link):
                assert (ROOT / page).parent.joinpath(link.partition("#")[0]).exists(), f"{page}: {link}"


def _citations(text: str) -> Iterator[tuple[str, str]]:
    """Page and heading of every `docs/PAGE.md, "Heading"`."""
    for match in QUOTED.finditer(text):
        for heading in re.findall(r'"([^"]+)"', match[2]):
            yield match[1], heading


@functools.cache
def _headings(page: str) -> frozenset[str]:
    path = ROOT / "docs" / f"{page}.md"
    return frozenset(re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if path.is_file() else ())


@functools.cache
def _texts() -> tuple[tuple[str, str], ...]:
    """Name and content of every tracked text file but this one, in one line each."""
    own = Path(__file__).relative_to(ROOT).as_posix()
    read = [(name, (ROOT / name).read_bytes()) for name in _tracked() if name != own]
    return tuple((name, _joined(data.decode(errors="replace"))) for name, data in read if b"\0" not in data[:8192])


def _joined(text: str) -> str:
    """Line breaks become spaces, comment signs at the start of a line included."""
    return LINE_BREAK.sub(" ", text)


@functools.cache
def _tracked() -> tuple[str, ...]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return tuple(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())
