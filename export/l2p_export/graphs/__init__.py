"""Exports networks to ONNX, and reads a bundle's ONNX graphs back."""
