"""Training: a latent source, a corpus it draws, and its transfer to pixels.

Follows section 3 of the L2P paper (arXiv 2605.12013), and docs/model.md, "Trunk and adapters" and "Training recipe".
"""
