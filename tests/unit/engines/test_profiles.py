from __future__ import annotations

from pathlib import Path

import pytest

from l2p_engines.profiles import load_profile, profile_names
from l2p_export.families.z_image_l2p.dimensions import published_dimensions
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_runtime.errors import UsageError


def test_built_in_profiles_fit_the_published_models() -> None:
    assert profile_names() == ("10k", "1k", "4k", "8k", "8k-zeroshot")
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        profile.check_model(
            model_spec(published_dimensions(name.removesuffix("-zeroshot") if name != "8k-zeroshot" else "4k"))
        )


def test_preferred_sizes_have_4096_tokens_and_zero_shot_8k_four_times_that() -> None:
    tokens = {name: (load_profile(name).height_px.opt // load_profile(name).patch_px) ** 2 for name in profile_names()}
    assert tokens == {"1k": 4096, "4k": 4096, "8k": 4096, "10k": 4096, "8k-zeroshot": 16_384}


def test_a_file_may_leave_out_what_has_a_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("patch_px = 16\nheight_px = {min=16, opt=32, max=64}\nwidth_px = {min=16, opt=32, max=64}\n")
    profile = load_profile(str(path))
    assert (profile.name, profile.sampling.steps, profile.caption_tokens.max) == ("mine", 50, 512)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("patch_px = ", "not TOML"),
        ("patch_px = 16", "lacks"),
        ("patch_px = 16\nheight_px = 3\nwidth_px = 3", "height_px is 3"),
        ("color = 'red'", "unknown keys color"),
    ],
)
def test_wrong_files_say_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        load_profile(str(path))


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        load_profile("5k")
    assert "8k-zeroshot" in caught.value.hint
