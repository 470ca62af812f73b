"""The text encoder: a Qwen3 folder becomes the network `text_encoder`, its tokenizer and its chat template.

A build calls `open_text_encoder` while it plans and `build.text.add_text_encoder` while it works.
"""

from l2p_export.families.qwen3.folder import TextEncoder, open_text_encoder

__all__ = ["TextEncoder", "open_text_encoder"]
