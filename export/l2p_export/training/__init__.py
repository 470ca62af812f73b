"""Training: a latent source, a corpus it draws, and its transfer to pixels (paper section 3; l2p.md 2.4, 2.5, 5)."""
