"""Forecasts tokens, FLOPs, bytes and time, and finds the settings that fit a GPU."""
