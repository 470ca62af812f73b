"""A latent source small enough for two cores: what it is made of and how it is trained."""
