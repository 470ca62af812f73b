from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_engines.builders.request import EngineSpec
from l2p_engines.builders.shapes import HeadBudget, engine_profiles, stripe_rows, symbol_ranges
from l2p_engines.forecast.calls import CallSize, engine_memory
from l2p_engines.profiles import load_profile, profile_names
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.families.z_image_l2p.dimensions import VARIANTS, published_dimensions
from l2p_runtime.contract import (
    NETWORKS,
    TEXT_ENCODER,
    EngineProfile,
    InputShapes,
    ModelSpec,
    NetworkSpec,
    Profile,
    Range,
    Target,
    TensorSpec,
)
from l2p_runtime.contract.codec import from_json, to_json
from l2p_runtime.errors import HostError, InternalError, UsageError
from l2p_runtime.stripes import plan_stripes

MODELS = {variant: ZImageModel(published_dimensions(variant)) for variant in VARIANTS.values()}
SPECS = {variant: model.spec for variant, model in MODELS.items()}
SHAPES = {(variant, network.name): network for variant, model in MODELS.items() for network in model.networks}
PROFILES = {name: load_profile(name) for name in profile_names()}
TARGET = Target("rtx", "1.7", "sm89")
ENCODER = NetworkSpec(
    TEXT_ENCODER,
    (TensorSpec("input_ids", "int64", ("B", "L")), TensorSpec("attention_mask", "int64", ("B", "L"))),
    (TensorSpec("prompt_embeds", "float32", ("B", "L", 2560)),),
)


def variant(name: str) -> str:
    return "4k" if name == "8k-zeroshot" else name


def sizes(model: ModelSpec, call: CallSize, rows: int) -> dict[str, int]:
    """What a call's symbols are, by docs/design.md, "Networks"; `rows` of the image go through the head at once."""
    unit, tokens = model.size_multiple_px, (call.height_px // model.patch_px) * (call.width_px // model.patch_px)
    return {
        "B": call.batch,
        "h": call.height_px // unit,
        "w": call.width_px // unit,
        "t": call.caption_tokens // 32,
        "s": -(-tokens // 32) * 32 + call.caption_tokens,
        "r": rows // model.head.row_multiple,
    }


def takes(profiles: Sequence[EngineProfile], network: NetworkSpec, values: Mapping[str, int]) -> bool:
    shapes = {spec.name: spec.resolve(values) for spec in network.inputs}
    return any(profile.covers(shapes) for profile in profiles)


def whole_call_is_taken(name: str, call: CallSize, budget: HeadBudget | None = None) -> None:
    model, profile = SPECS[variant(name)], PROFILES[name]
    rows = call.height_px // model.patch_px
    stripes = plan_stripes(model.head, rows, 1, stripe_rows(model, profile, budget))
    for network in NETWORKS:
        spec = SHAPES[variant(name), network]
        profiles = engine_profiles(spec, model, [profile], budget)
        for stripe in stripes:
            assert takes(profiles, spec, sizes(model, call, stripe.read_stop - stripe.read_first)), network


@st.composite
def calls(draw: st.DrawFn, profile: Profile, model: ModelSpec) -> CallSize:
    unit = model.size_multiple_px
    height, width = (
        unit * draw(st.integers(span.min // unit, span.max // unit)) for span in (profile.height_px, profile.width_px)
    )
    caption = profile.caption_tokens
    return CallSize(height, width, 32 * draw(st.integers(caption.min // 32, caption.max // 32)), profile.batch.min)


def budgets(model: ModelSpec, profile: Profile) -> st.SearchStrategy[HeadBudget | None]:
    """Any budget that a stripe of the widest image fits."""
    if model.head.halo_rows is None:
        return st.none()
    call = CallSize(profile.height_px.max, profile.width_px.max, profile.caption_tokens.max)
    row_bytes = engine_memory(model, call, "fp16").head_row_bytes
    least = (2 * model.head.halo_rows + 1) * row_bytes
    return st.none() | st.integers(least, 80 * row_bytes).map(lambda size: HeadBudget(size, "fp16"))


@given(st.data(), st.sampled_from(sorted(PROFILES)))
def test_every_call_within_a_profile_is_taken_by_every_network(data: st.DataObject, name: str) -> None:
    model, profile = SPECS[variant(name)], PROFILES[name]
    whole_call_is_taken(name, data.draw(calls(profile, model)), data.draw(budgets(model, profile)))


# 2160 and 4320 are no multiples of these patches; what stands here is the next size below.
@pytest.mark.parametrize(
    ("name", "width", "height"),
    [
        ("1k", 1536, 864),
        ("1k", 256, 1536),
        ("4k", 3840, 2112),
        ("4k", 4096, 2112),
        ("4k", 2112, 3840),
        ("8k", 7680, 4224),
        ("8k", 2048, 3840),
        ("8k-zeroshot", 7680, 4288),
        ("8k-zeroshot", 4288, 7680),
        ("10k", 7680, 4160),
        ("10k", 4160, 7680),
        ("10k", 3840, 10240),
    ],
)
@pytest.mark.parametrize("caption", [32, 512])
def test_sizes_that_are_not_square_are_taken(name: str, width: int, height: int, caption: int) -> None:
    whole_call_is_taken(name, CallSize(height, width, caption))


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_what_a_profile_leaves_out_is_not_taken(name: str) -> None:
    model, profile = SPECS[variant(name)], PROFILES[name]
    unit = model.size_multiple_px
    stem = SHAPES[variant(name), "stem"]
    profiles = engine_profiles(stem, model, [profile])
    corner = CallSize(profile.height_px.max, profile.width_px.max, profile.caption_tokens.max)
    assert takes(profiles, stem, sizes(model, corner, 1))
    for outside in (
        replace(corner, height_px=corner.height_px + unit),
        replace(corner, width_px=profile.width_px.min - unit),
        replace(corner, caption_tokens=544),
        replace(corner, batch=2),
    ):
        assert not takes(profiles, stem, sizes(model, outside, 1)), outside


def test_a_profile_that_is_not_square_is_taken_as_it_is() -> None:
    model, stem, head = SPECS["4k"], SHAPES["4k", "stem"], SHAPES["4k", "head"]
    wide = Profile("wide", 64, Range(1024, 2112, 2112), Range(1024, 3840, 4160), batch=Range(1, 2, 4))
    (profile,) = engine_profiles(stem, model, [wide])
    assert [(shapes.min, shapes.opt, shapes.max) for shapes in profile.inputs if shapes.name == "image"] == [
        ((1, 3, 1024, 1024), (2, 3, 2112, 3840), (4, 3, 2112, 4160))
    ]
    # 33 x 65 tokens are padded to a multiple of 32.
    assert profile.largest("rope_cos") == (2176 + 512, 64)
    assert not takes([profile], stem, sizes(model, CallSize(3840, 2112, 32), 1))
    (stripes,) = engine_profiles(head, model, [wide])
    assert stripes.largest("tokens") == (4, 33, 65, 3840)


def test_the_trunk_is_the_same_for_every_patch_of_4096_tokens() -> None:
    def shapes(network: str) -> list[tuple[EngineProfile, ...]]:
        return [
            engine_profiles(SHAPES[name, network], SPECS[name], [PROFILES[name]]) for name in ("4k", "8k", "10k", "1k")
        ]

    for network in ("trunk", "tail"):
        first, second, third, other = shapes(network)
        assert first == second == third != other
        (profile,) = first
        assert profile.largest("tokens") == (1, 4096 + 512, 3840)
    assert len(set(shapes("caption"))) == 1
    assert len(set(shapes("stem"))) == len(set(shapes("head"))) == 4


@given(st.data(), st.sampled_from(["1k", "4k", "8k", "8k-zeroshot"]), st.sampled_from(["fp32", "fp16"]))
def test_an_image_is_cut_so_that_stripes_fit_the_head(data: st.DataObject, name: str, precision: str) -> None:
    model, profile, head = SPECS[variant(name)], PROFILES[name], SHAPES[variant(name), "head"]
    widest = CallSize(profile.height_px.max, profile.width_px.max, profile.caption_tokens.max)
    row_bytes = engine_memory(model, widest, precision).head_row_bytes
    budget = HeadBudget(data.draw(st.integers(7 * row_bytes, 140 * row_bytes)), precision)
    most = stripe_rows(model, profile, budget)
    assert most * row_bytes <= budget.size_bytes
    assert most == profile.height_px.max // model.patch_px or (most + 1) * row_bytes > budget.size_bytes
    (shapes,) = engine_profiles(head, model, [profile], budget)
    assert shapes.largest("tokens")[1] == most
    rows = data.draw(st.integers(1, profile.height_px.max // model.patch_px))
    stripes = plan_stripes(model.head, rows, 1, most)
    assert [row for stripe in stripes for row in range(stripe.first, stripe.stop)] == list(range(rows))
    call = replace(widest, height_px=rows * model.patch_px)
    for stripe in stripes:
        assert takes([shapes], head, sizes(model, call, stripe.read_stop - stripe.read_first))
    tallest = profile.height_px.max // model.patch_px
    by_budget = plan_stripes(model.head, tallest, row_bytes, budget.size_bytes)
    assert plan_stripes(model.head, tallest, 1, most) == by_budget


def test_the_preferred_stripe_is_the_longest_of_the_preferred_image() -> None:
    model, profile = SPECS["8k"], PROFILES["8k"]
    row_bytes = engine_memory(model, CallSize(8192, 8192, 512), "fp16").head_row_bytes
    # 64 rows in stripes of 26 are 20 and a halo of 3 on each side.
    assert symbol_ranges(model, profile, HeadBudget(26 * row_bytes, "fp16"))["r"] == Range(1, 22, 26)
    assert symbol_ranges(model, profile)["r"] == Range(1, 64, 64)
    assert symbol_ranges(SPECS["10k"], PROFILES["10k"])["r"] == Range(1, 32, 32)


@pytest.mark.parametrize(("name", "budget"), [("4k", 1 << 10), ("4k", 0), ("10k", 1 << 30)])
def test_a_head_that_cannot_be_cut_to_its_budget_is_refused(name: str, budget: int) -> None:
    with pytest.raises(HostError, match="pixel head needs"):
        engine_profiles(SHAPES[name, "head"], SPECS[name], [PROFILES[name]], HeadBudget(budget, "fp16"))


def test_profiles_that_are_the_same_for_a_network_become_one() -> None:
    both = [PROFILES["4k"], PROFILES["8k-zeroshot"]]
    found = {name: engine_profiles(SHAPES["4k", name], SPECS["4k"], both) for name in NETWORKS}
    assert {name: len(profiles) for name, profiles in found.items()} == {
        "caption": 1,
        "stem": 2,
        "trunk": 2,
        "tail": 2,
        "head": 2,
    }
    alone = [engine_profiles(SHAPES["4k", "stem"], SPECS["4k"], [profile])[0] for profile in both]
    assert list(found["stem"]) == alone
    again = engine_profiles(SHAPES["4k", "stem"], SPECS["4k"], [*both, replace(both[0], name="again")])
    assert again == found["stem"]


def test_a_text_encoder_takes_several_prompts_of_any_length() -> None:
    (profile,) = engine_profiles(ENCODER, SPECS["4k"], [PROFILES["4k"]])
    assert profile.inputs[0] == InputShapes("input_ids", (1, 1), (2, 128), (4, 512))
    assert len(engine_profiles(ENCODER, SPECS["4k"], [PROFILES["4k"], PROFILES["8k-zeroshot"]])) == 1


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        (PROFILES["8k"], "is for 128 px patches"),
        (replace(PROFILES["4k"], caption_tokens=Range(32, 128, 1024)), "max is 1024, the model takes 512"),
        (replace(PROFILES["4k"], height_px=Range(1024, 4096, 64 * 513)), "the model reaches 32768 px"),
    ],
)
def test_a_profile_of_another_model_is_refused(profile: Profile, says: str) -> None:
    for network in NETWORKS:
        with pytest.raises(UsageError, match=says):
            engine_profiles(SHAPES["4k", network], SPECS["4k"], [PROFILES["4k"], profile])


def test_an_engine_needs_a_profile_and_known_symbols() -> None:
    with pytest.raises(UsageError, match="engine of `trunk` needs a profile"):
        engine_profiles(SHAPES["4k", "trunk"], SPECS["4k"], [])
    strange = NetworkSpec("strange", (TensorSpec("x", "float32", ("B", "q")),), ())
    with pytest.raises(InternalError, match="shapes in `q`"):
        engine_profiles(strange, SPECS["4k"], [PROFILES["4k"]])


def trunk_shapes(**changed: tuple[tuple[int, ...], ...]) -> EngineProfile:
    (profile,) = engine_profiles(SHAPES["4k", "trunk"], SPECS["4k"], [PROFILES["4k"]])
    return EngineProfile(
        tuple(InputShapes(old.name, *changed[old.name]) if old.name in changed else old for old in profile.inputs)
    )


def test_a_spec_reads_back_as_it_was_sent() -> None:
    spec = EngineSpec(SHAPES["4k", "trunk"], "fp16", TARGET, (trunk_shapes(),), ("float16", "float32"))
    assert from_json(EngineSpec, json.loads(json.dumps(to_json(spec)))) == spec
    assert spec.label == "trunk.fp16.rtx1.7-sm89"


@pytest.mark.parametrize(
    ("profiles", "says"),
    [
        ((), "needs a profile"),
        ((EngineProfile(trunk_shapes().inputs[1:]),), "a profile has inputs modulation, rope_cos, rope_sin"),
        ((EngineProfile(trunk_shapes().inputs[::-1]),), "`trunk` takes tokens, modulation"),
        ((trunk_shapes(), trunk_shapes(tokens=((1, 288, 64),) * 3)), "expected .B, s, 3840."),
        # A sequence that contradicts the tables', which the libraries would only warn of.
        ((trunk_shapes(tokens=((1, 320, 3840), (1, 4224, 3840), (1, 4608, 3840))),), "s=320"),
    ],
)
def test_shapes_that_a_network_does_not_take_are_refused(profiles: tuple[EngineProfile, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        EngineSpec(SHAPES["4k", "trunk"], "fp16", TARGET, profiles)


@pytest.mark.parametrize(
    ("low", "mid", "high", "says"),
    [
        ((1, 2), (1, 2), (1, 2, 3), "different ranks"),
        ((0, 2), (1, 2), (1, 2), "min"),
        ((2, 2), (1, 2), (3, 2), "min"),
        ((1, 2), (4, 2), (3, 2), "opt"),
    ],
)
def test_ranges_out_of_order_are_refused(
    low: tuple[int, ...], mid: tuple[int, ...], high: tuple[int, ...], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        InputShapes("x", low, mid, high)


def test_a_profile_covers_only_all_of_its_inputs() -> None:
    profile = EngineProfile((InputShapes("x", (1, 2), (1, 2), (1, 4)),))
    assert profile.covers({"x": (1, 3)})
    for shapes in ({}, {"x": (1, 5)}, {"x": (1, 3, 1)}, {"x": (1, 3), "y": (1, 3)}, {"y": (1, 3)}):
        assert not profile.covers(shapes)
