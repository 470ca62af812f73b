"""Frames of a shot: ranges, file names, prompts by frame, and the loop that draws them (docs/frames.md)."""
