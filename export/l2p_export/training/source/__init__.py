"""Latent source small enough for two cores: its parts, its training, and its pipeline folder."""
