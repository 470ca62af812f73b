from __future__ import annotations

import pytest

from fakes.sources import write_tiny_source
from l2p_export.training.source.folder import Source


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A tiny latent source, which tests leave as it is."""
    return write_tiny_source(tmp_path_factory.mktemp("source") / "tiny")
