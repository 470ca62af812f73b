"""Engine builders: an engine library compiles an ONNX graph to an engine, in a process of its own."""
