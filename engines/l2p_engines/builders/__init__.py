"""Engine builders: an engine library turns a graph into an engine, in a process of its own."""
