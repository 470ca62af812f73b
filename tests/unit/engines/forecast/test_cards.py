from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_engines.forecast.cards import CARDS, Card, find_card
from l2p_runtime.errors import UsageError

KNOWN = {
    "rtx4090": "RTX 4090",
    "RTX 4090": "RTX 4090",
    "4090": "RTX 4090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "nvidia geforce rtx 5070 ti": "RTX 5070 Ti",
    "RTX 3060": "RTX 3060 12GB",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX PRO 6000 Blackwell",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100 80GB PCIe": "A100 80GB PCIe",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "h100": "H100 SXM",
    "NVIDIA H200": "H200",
    "L40S": "L40S",
    "NVIDIA A10": "A10",
}


@pytest.mark.parametrize(("text", "name"), KNOWN.items())
def test_usual_spellings_are_understood(text: str, name: str) -> None:
    assert find_card(text).name == name


@given(st.sampled_from(CARDS), st.sampled_from(["{}", "NVIDIA {}", "nvidia geforce {}", " {} "]), st.booleans())
def test_every_card_is_found_by_its_name(card: Card, form: str, lower: bool) -> None:
    name = form.format(card.name)
    assert find_card(name.lower().replace(" ", "") if lower else name) is card


def test_spellings_mean_one_card_each() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert all(find_card(alias) is card for alias in card.aliases)


@pytest.mark.parametrize("text", ["RTX 4090 Laptop GPU", "A10G", "RTX 4080 Super", "RTX 3080 Ti", "", "toaster"])
def test_other_cards_are_not_taken_for_a_known_one(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_card(text)
    assert "--vram" in caught.value.hint
    if "40" in text or "30" in text:
        assert text.split()[1] in caught.value.hint


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_figures_are_plausible(card: Card) -> None:
    assert 8 << 30 <= card.vram_bytes <= 192 << 30
    assert card.sm in (75, 80, 86, 89, 90, 120, 121)
    assert 200 <= card.bandwidth_gb_s <= 8000
    assert card.fp16_tflops is None or 20 <= card.fp16_tflops <= 1000
    # Tensor cores run FP8 twice as fast as float16, where they run it.
    assert card.fp8_tflops is None or card.fp8_tflops == pytest.approx(2 * (card.fp16_tflops or 0), rel=0.02)
    assert card.runs("fp8") or card.fp8_tflops is None
    assert card.peak_tflops("bf16") == (card.fp16_tflops if card.sm >= 80 else None)
