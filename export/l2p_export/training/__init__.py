"""Training: a latent source, a corpus that it draws, and its transfer to pixel space.

Follows section 3 of the L2P paper (arXiv 2605.12013), and docs/model.md, "Trunk and adapters" and "Training recipe".
"""
