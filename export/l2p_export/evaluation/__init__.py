"""How well a model draws what it is told: scores of the small world, and folders for public benchmarks."""
