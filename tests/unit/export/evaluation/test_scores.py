from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l2p_export.evaluation.contact_sheet import FRAME_PX, RIGHT, WRONG
from l2p_export.evaluation.scores import (
    PARTS,
    ROWS_NAME,
    SCORES_NAME,
    SHEET_NAME,
    Evaluation,
    Prompt,
    Score,
    draw_all,
    evaluate,
    file_prompts,
    scores_json,
    world_prompts,
    write_evaluation,
)
from l2p_export.world.captions import caption
from l2p_export.world.scenes import COLOURS, RELATIONS, SHAPES, Description
from l2p_runtime.errors import ArtifactError, UsageError
from l2p_runtime.progress import Silent
from unit.export.evaluation.fake_drawers import FakeModel, rendered
from unit.export.world.worlds import OPPOSITE, Pixels

Change = Callable[[Description], Description]


def _same(description: Description) -> Description:
    return description


def _next(names: list[str], name: str) -> str:
    return names[(names.index(name) + 1) % len(names)]


def _recoloured(description: Description) -> Description:
    things = tuple(replace(thing, colour=_next(list(COLOURS), thing.colour)) for thing in description.things)
    return replace(description, things=things)


def _reshaped(description: Description) -> Description:
    things = tuple(replace(thing, shape=_next(list(SHAPES), thing.shape)) for thing in description.things)
    return replace(description, things=things)


def _mirrored(description: Description) -> Description:
    return replace(description, relation=OPPOSITE[description.relation] if description.relation else None)


def _on_another_ground(description: Description) -> Description:
    return replace(description, background=_next(["white", "grey", "black"], description.background or "white"))


def _doubled(description: Description) -> Description:
    """Two objects where one was wanted, one where two were."""
    if len(description.things) == 2:
        return replace(description, things=description.things[:1], relation=None)
    thing = description.things[0]
    return replace(description, things=(thing, replace(thing, shape=_next(list(SHAPES), thing.shape))), relation="left")


def _evaluated(prompts: tuple[Prompt, ...], make: Callable[[str, int], Pixels], out: Path | None = None) -> Evaluation:
    return evaluate(prompts, draw_all(FakeModel(make).drawer(), prompts, out, Silent()))


# Scores.


def test_renders_of_the_captions_are_right_in_every_category_and_part() -> None:
    found = _evaluated(world_prompts(80, 3, held_out=True), rendered())
    assert found.overall == Score(80, 80)
    assert all(score.passed == score.count for score in (*found.categories.values(), *found.parts.values()))
    categories = found.categories
    assert categories["one object"].count + categories["two objects"].count == 80
    assert categories["background named"].count + categories["no background named"].count == 80
    assert (categories["held-out combination"].count, categories["training combination"].count) == (80, 0)
    assert found.parts["relation"].count == categories["two objects"].count > 0
    assert found.parts["background"].count == found.parts["object count"].count == 80


@pytest.mark.parametrize(("part", "change"), [("colours", _recoloured), ("shapes", _reshaped), ("relation", _mirrored)])
def test_what_is_wrong_shows_in_its_part_alone(part: str, change: Change) -> None:
    prompts = tuple(p for p in world_prompts(60, 3, held_out=False) if part != "relation" or p.description.relation)
    found = _evaluated(prompts, rendered(change))
    assert found.overall == Score(0, len(prompts))
    assert found.parts[part] == Score(0, len(prompts))
    for other in {"background", "object count", "colours", "shapes"} - {part}:
        assert found.parts[other] == Score(len(prompts), len(prompts)), other


def test_a_background_is_wrong_only_where_one_is_named() -> None:
    found = _evaluated(world_prompts(60, 3, held_out=False), rendered(_on_another_ground))
    named, unnamed = found.categories["background named"], found.categories["no background named"]
    assert named.passed == 0 < named.count
    assert unnamed.passed == unnamed.count > 0
    assert found.parts["background"] == Score(unnamed.count, 60)


def test_too_many_and_too_few_objects_are_wrong_in_their_count() -> None:
    found = _evaluated(world_prompts(60, 3, held_out=False), rendered(_doubled))
    assert found.parts["object count"] == Score(0, 60)
    assert found.overall == Score(0, 60)
    one = [row for row in found.rows if len(row.prompt.description.things) == 1]
    assert all(row.parts["colours"] and row.parts["shapes"] for row in one)


def test_rows_say_what_the_judge_said_of_each_image() -> None:
    prompts = world_prompts(5, 3, held_out=True)
    rows = _evaluated(prompts, rendered(_recoloured)).rows
    assert [row.prompt for row in rows] == list(prompts)
    assert all(row.text.startswith("wrong: ") for row in rows)
    assert {"relation" in row.parts for row in rows if row.prompt.description.relation is None} == {False}
    assert set(rows[0].parts) <= set(PARTS)


@pytest.mark.parametrize(
    ("passed", "count", "low", "high"),
    # Newcombe 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_the_published_ones(passed: int, count: int, low: float, high: float) -> None:
    assert Score(passed, count).interval == pytest.approx((low, high), abs=5e-5)
    assert Score(count - passed, count).interval == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_no_image_has_no_share() -> None:
    assert Score(0, 0).share is None
    assert Score(0, 0).interval is None


def test_other_counts_of_images_are_a_mistake() -> None:
    prompts = world_prompts(2, 0, held_out=False)
    with pytest.raises(ValueError, match="shorter"):
        evaluate(prompts, iter([rendered()(prompts[0].text, 0)]))
    with pytest.raises(UsageError):
        evaluate((), iter(()))


# The distance to renders.


def test_a_perfect_model_is_as_far_from_renders_as_renders_are() -> None:
    prompts = world_prompts(150, 3, held_out=False)
    right, wrong = (_evaluated(prompts, rendered(change)).frechet for change in (_same, _on_another_ground))
    assert right.to_renders is not None
    assert right.between_renders is not None
    assert wrong.to_renders is not None
    assert 0.5 < right.to_renders / right.between_renders < 2
    assert wrong.to_renders > 10 * right.to_renders
    assert wrong.between_renders == right.between_renders


def test_too_few_images_say_so_instead_of_a_number() -> None:
    figures = scores_json(_evaluated(world_prompts(56, 3, held_out=False), rendered()))["frechet"]
    assert isinstance(figures, dict)
    assert figures["to_renders"] is figures["between_renders"] is None
    assert "not enough images: 56" in figures["reason"]


# What is drawn.


@pytest.mark.parametrize("held_out", [False, True])
def test_captions_follow_from_the_seed_and_are_said_plainly(held_out: bool) -> None:
    prompts = world_prompts(40, 7, held_out=held_out)
    assert prompts == world_prompts(40, 7, held_out=held_out) != world_prompts(40, 8, held_out=held_out)
    assert prompts[:10] == world_prompts(10, 7, held_out=held_out)
    assert [prompt.seed for prompt in prompts] == list(range(7, 47))
    assert {prompt.description.held_out for prompt in prompts} == {held_out}
    assert all(prompt.text == caption(prompt.description) for prompt in prompts)


def test_captions_from_a_file_keep_their_words(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("# mine\n\nA Red Circle\nblue square over green circle\n", encoding="utf-8")
    prompts = file_prompts(path, 2, 5)
    assert [prompt.text for prompt in prompts] == ["A Red Circle"] * 2 + ["blue square over green circle"] * 2
    assert [prompt.seed for prompt in prompts] == [5, 6, 7, 8]
    assert prompts[2].description.relation == "above"
    assert set(RELATIONS) >= {"above"}


def test_a_caption_of_another_world_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("# mine\na red circle\n\n  a purple cow\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"captions.txt` line 4: .*purple cow") as caught:
        file_prompts(path, 1, 0)
    assert "--layout" in caught.value.hint


@pytest.mark.parametrize("content", ["", "\n# nothing\n", None])
def test_files_without_prompts_are_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "captions.txt"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"captions.txt"):
        file_prompts(path, 1, 0)


@pytest.mark.parametrize("seed", [-1, 2**64 - 3])
def test_seeds_that_run_out_are_refused(seed: int) -> None:
    with pytest.raises(UsageError, match="seed is"):
        world_prompts(4, seed, held_out=False)


# In a folder.


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    prompts = world_prompts(9, 3, held_out=True)
    stopped = FakeModel(rendered(), stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(prompts, draw_all(stopped.drawer(), prompts, tmp_path / "a", Silent()))
    # What a kill leaves: half a row, and an image without one.
    with (tmp_path / "a" / "metadata.jsonl").open("a") as file:
        file.write('{"file_na')
    resumed = FakeModel(rendered())
    found = evaluate(prompts, draw_all(resumed.drawer(), prompts, tmp_path / "a", Silent()))
    assert resumed.seeds == [7, 8, 9, 10, 11]
    whole = _evaluated(prompts, rendered(), tmp_path / "b")
    assert found.rows == whole.rows
    assert scores_json(found) == scores_json(whole)
    np.testing.assert_array_equal(found.sheet, whole.sheet)
    for path in (tmp_path / "b").rglob("*"):
        if path.is_file():
            assert (tmp_path / "a" / path.relative_to(tmp_path / "b")).read_bytes() == path.read_bytes()


def test_a_finished_run_draws_nothing_again(tmp_path: Path) -> None:
    prompts = world_prompts(3, 3, held_out=True)
    first = _evaluated(prompts, rendered(), tmp_path)
    again = FakeModel(rendered(_recoloured))
    assert evaluate(prompts, draw_all(again.drawer(), prompts, tmp_path, Silent())).rows == first.rows
    assert again.seeds == []


@pytest.mark.parametrize("change", ["model", "prompts", "seed", "count"])
def test_images_of_other_settings_are_not_mixed(tmp_path: Path, change: str) -> None:
    _evaluated(world_prompts(3, 3, held_out=True), rendered(), tmp_path)
    model = FakeModel(rendered())
    if change == "model":
        model.settings = {"model_sha256": "another", "steps": 1}
    count, seed = (4 if change == "count" else 3), (4 if change == "seed" else 3)
    prompts = world_prompts(count, seed, held_out=change != "prompts")
    with pytest.raises(UsageError, match="other settings"):
        list(draw_all(model.drawer(), prompts, tmp_path, Silent()))
    assert model.seeds == []


def test_a_changed_image_is_not_judged(tmp_path: Path) -> None:
    prompts = world_prompts(3, 3, held_out=True)
    _evaluated(prompts, rendered(), tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "00" / "00000001.png")
    with pytest.raises(ArtifactError, match=r"00000001.png"):
        _evaluated(prompts, rendered(), tmp_path)


def test_results_are_written_for_eyes_and_for_programs(tmp_path: Path) -> None:
    prompts = world_prompts(10, 3, held_out=True)
    # Every other image is right: the seeds begin with 3.
    found = _evaluated(
        prompts, lambda text, seed: rendered(_recoloured if seed % 2 == 0 else _same)(text, seed), tmp_path
    )
    write_evaluation(tmp_path, found, {"model": "fake", **scores_json(found)})
    scores = json.loads((tmp_path / SCORES_NAME).read_text(encoding="utf-8"))
    assert scores["model"] == "fake"
    low, high = Score(5, 10).interval or ()
    assert scores["overall"] == {"share": 0.5, "low": low, "high": high, "passed": 5, "count": 10}
    rows = [json.loads(line) for line in (tmp_path / ROWS_NAME).read_text(encoding="utf-8").splitlines()]
    metadata = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [(row["text"], row["seed"]) for row in metadata]
    assert [row["passed"] for row in rows] == [True, False] * 5
    assert rows[1]["parts"]["colours"] is False
    with Image.open(tmp_path / SHEET_NAME) as sheet:
        tile = 64 + 2 * FRAME_PX
        assert sheet.size == (8 * tile, 2 * tile)
        corners = [sheet.getpixel((x * tile, y * tile)) for y, x in ((0, 0), (0, 1), (1, 1), (1, 2))]
        inside = np.asarray(sheet)[FRAME_PX : FRAME_PX + 64, FRAME_PX : FRAME_PX + 64]
    assert corners == [RIGHT, WRONG, WRONG, (255, 255, 255)]
    np.testing.assert_array_equal(inside, np.asarray(Image.open(tmp_path / "images" / "00" / "00000000.png")))


@pytest.mark.parametrize(("height_px", "width_px", "tile"), [(512, 256, (128, 64)), (16, 2100, (1, 123))])
def test_large_images_are_small_on_the_sheet(height_px: int, width_px: int, tile: tuple[int, int]) -> None:
    prompts = world_prompts(1, 3, held_out=False)
    image = np.full((height_px, width_px, 3), 200, np.uint8)
    sheet = evaluate(prompts, [image]).sheet
    assert sheet.shape[:2] == (tile[0] + 2 * FRAME_PX, tile[1] + 2 * FRAME_PX)
    assert (sheet[FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX] == 200).all()
