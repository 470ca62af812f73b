"""Precision plans: the dtype of each layer, measured FP16, FP8, and their files."""
