"""The training loop: steps, saved states, process groups, FP32 master weights."""
