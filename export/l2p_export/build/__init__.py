"""Builds a bundle, adds its text encoder, and packs copies of it."""
