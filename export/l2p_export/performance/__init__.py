"""What a model takes before it runs (forecast) and what it took when it ran (bench)."""
