"""Which dtype each layer gets: precision plans, calibration, sensitivity sweep, explanations."""
