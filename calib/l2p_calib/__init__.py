"""Precision plans, calibration statistics, and the thresholds of comparisons."""
