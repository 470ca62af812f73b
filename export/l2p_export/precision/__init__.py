"""Decides the dtype of each layer: precision plans, calibration, sensitivity sweep, explanations."""
