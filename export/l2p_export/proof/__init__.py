"""Compares ONNX graphs and engines with torch float32: cases, reference, comparisons, `verify`."""
