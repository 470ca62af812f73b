from __future__ import annotations

import pytest

from l2p_export.families.z_image_l2p.dimensions import published_dimensions
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_runtime.errors import UsageError
from l2p_runtime.memory import available_host_bytes, call_memory, parse_bytes


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
