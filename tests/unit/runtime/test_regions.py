"""Shared memory that is kept for the next image, lent to callers, and given back."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from l2p_runtime.client.regions import LENT_MAX, Region, Regions

SHM = Path("/dev/shm")  # noqa: S108 - where the kernel keeps them


class Server:
    """Maps what it is told of, as a server does."""

    def __init__(self) -> None:
        self.known: dict[str, mmap.mmap] = {}
        self.made = 0

    def register(self, name: str, key: str, size_bytes: int) -> None:
        if size_bytes == 13:
            raise OSError("no")
        descriptor = os.open(SHM / key.strip("/"), os.O_RDWR)
        self.known[name] = mmap.mmap(descriptor, size_bytes)
        os.close(descriptor)
        self.made += 1

    def unregister(self, name: str) -> None:
        self.known.pop(name).close()

    def write(self, region: Region, value: int) -> None:
        self.known[region.name][:8] = bytes([value]) * 8


def _image(regions: Regions, server: Server, value: int) -> np.ndarray:
    with regions.take(4096) as region:
        server.write(region, value)
        return regions.read(region, "UINT8", (2, 4))


def test_an_image_is_the_memory_itself_until_its_last_view_is_gone() -> None:
    server = Server()
    regions = Regions(server)
    first = _image(regions, server, 1)
    view = first[::2, 1:]
    second = _image(regions, server, 2)
    assert server.made == 2
    del first
    gc.collect()
    third = _image(regions, server, 3)
    assert server.made == 3
    assert (view == 1).all()
    assert (second == 2).all()
    del view, third
    gc.collect()
    assert (_image(regions, server, 4) == 4).all()
    assert server.made == 3
    assert (second == 2).all()


def test_who_keeps_many_images_has_copies() -> None:
    server = Server()
    regions = Regions(server)
    kept = [_image(regions, server, number) for number in range(LENT_MAX + 5)]
    assert server.made == LENT_MAX + 1
    assert [int(image[0, 0]) for image in kept] == list(range(LENT_MAX + 5))
    kept[0][:] = 200
    assert int(kept[1][0, 0]) == 1


def test_memory_has_no_name_once_both_map_it_and_images_outlive_the_client() -> None:
    before = set(SHM.glob("l2p_client_*"))
    server = Server()
    regions = Regions(server)
    image = _image(regions, server, 5)
    assert set(SHM.glob("l2p_client_*")) <= before
    regions.close()
    assert server.known == {}
    assert (image == 5).all()


def test_a_call_that_fails_leaves_its_memory_to_no_other() -> None:
    server = Server()
    regions = Regions(server)
    with pytest.raises(RuntimeError), regions.take(4096):
        raise RuntimeError
    assert server.known == {}
    assert (_image(regions, server, 6) == 6).all()
    assert server.made == 2


def test_a_server_that_does_not_see_the_memory_leaves_nothing_behind() -> None:
    before = set(SHM.glob("l2p_client_*"))
    regions = Regions(Server())
    with pytest.raises(OSError, match="no"), regions.take(13):
        pass
    assert set(SHM.glob("l2p_client_*")) <= before
    assert regions.works()
