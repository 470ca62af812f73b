"""Prompt adherence of a model: scores on the small world, and image folders for public benchmarks."""
