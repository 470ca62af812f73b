from __future__ import annotations

from dataclasses import replace

import pytest

from l2p_export.families.z_image_l2p.dimensions import published_dimensions
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_runtime.errors import UsageError
from l2p_runtime.memory import available_host_bytes, call_memory, cpu_call_memory, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 << 30), ("1.5 GiB", 3 << 29), ("500MB", 500_000_000), ("7", 7), ("2kib", 2048), (" 1 TB ", 10**12)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "6 parsecs", "1e9", "6GiB6", "nan"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no size in bytes"):
        parse_bytes(text)


def test_there_is_some_memory() -> None:
    assert available_host_bytes() > 1 << 20


def test_the_head_bounds_large_images() -> None:
    need = call_memory(model_spec(published_dimensions("4k")), 1, 64, 64, 128)
    # Float32: a 4096 px map of 16 channels is 1 GiB; joined, convolved and activated there are six of them.
    assert 4 << 30 < 64 * need.head_row_bytes < 9 << 30
    assert need.buffers_bytes == 4 * (3 * 3 * 4096 * 4096 + 4 * (4096 + 128) * 3840)


def test_without_guidance_one_prediction_is_held() -> None:
    model = model_spec(published_dimensions("4k"))
    two, one = (call_memory(model, 1, 64, 64, 128, prompts) for prompts in (2, 1))
    assert two.buffers_bytes - one.buffers_bytes == 4 * (3 * 4096 * 4096 + 2 * (4096 + 128) * 3840)


def test_fused_graphs_hold_no_scores() -> None:
    """On the CPU, at 16,416 tokens: the feed-forward of 3 x 10,240 and 4 x 3,840 values a token, or the 8K patches."""
    model = model_spec(published_dimensions("4k"))
    tokens = 16384 + 32
    assert cpu_call_memory(model, 1, 128, 128, 32).tokens_bytes == 4 * tokens * (3 * 10240 + 4 * 3840)
    narrow = cpu_call_memory(replace(model, width=128, heads=1, ffn_width=340), 1, 128, 128, 32)
    assert narrow.tokens_bytes == 4 * (3 * 8192**2 + 16384 * 128)


def test_a_fused_head_copies_no_skip() -> None:
    """At 4096 px, the skip, the upsampled image and what is made of both, of 16 channels: 1 GiB each; and borders."""
    model = model_spec(published_dimensions("4k"))
    fused, whole = (cpu_call_memory(model, 1, 64, 64, 128, fused_head=fused_head) for fused_head in (True, False))
    assert 64 * fused.head_row_bytes == (3 << 30) + 4 * (6 * 4096**2 + 64 * 64 * model.width)
    assert whole.tokens_bytes == fused.tokens_bytes
    assert 64 * whole.head_row_bytes == 6 << 30
