from __future__ import annotations

from pathlib import Path

from l2p_engines.store.stages import Home, StageOutput, StageRunner
from l2p_export.build.progress import WholeBuild
from l2p_runtime.progress import Silent


class Titles(Silent):
    """Keeps the titles of all tasks."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def task(self, title, total=0, unit="bytes"):  # type: ignore[no-untyped-def]
        self.titles.append(title)
        return super().task(title, total, unit)

    def phases(self, title):  # type: ignore[no-untyped-def]
        self.titles.append(title)
        return super().phases(title)


def test_each_task_says_what_is_done_and_left(tmp_path: Path) -> None:
    titles = Titles()
    run = StageRunner(Home(tmp_path))
    whole = WholeBuild(titles, run.kinds, 3)
    for kind, label in (
        ("digests", "x"),
        ("graph", "a"),
        ("trace", "b"),
        ("graph", "b"),
        ("proof", "all"),
        ("graph", "c"),
    ):

        def make(work: Path) -> StageOutput:
            with whole.task("writing"), whole.phases("compiling"):
                return StageOutput()

        run(kind, label, {"label": label}, make)
    done = [0, 0, 1, 1, 2, 3]
    assert titles.titles == [
        f"[{count} done, {3 - count} left] {what}" for count in done for what in ("writing", "compiling")
    ]


def test_stages_that_are_found_count_as_done(tmp_path: Path) -> None:
    for _ in range(2):
        run = StageRunner(Home(tmp_path))
        run("graph", "a", {}, lambda work: StageOutput())
        assert run.kinds == ["graph"]
