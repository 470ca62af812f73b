"""A source moved to pixels: what is trained on what, in how much memory, and what is written."""
