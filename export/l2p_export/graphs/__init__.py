"""Networks to ONNX: trace, weights, graph files."""
