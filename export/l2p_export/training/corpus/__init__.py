"""Training images with captions: drawn by a source, rendered, or a user's own."""

from l2p_export.training.corpus.corpus import open_corpus, read_image

__all__ = ["open_corpus", "read_image"]
