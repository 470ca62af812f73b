"""Activation statistics: collected from torch modules or ONNX graphs, merged and stored."""
