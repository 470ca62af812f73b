"""Engine builds: profiles, builders, forecasts, and the store of stages."""
