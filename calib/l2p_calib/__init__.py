"""Precision plans, and how far one stage may be from the one before it."""
