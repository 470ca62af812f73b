"""Forecasts the time and memory of a model, and measures them with `bench`."""
