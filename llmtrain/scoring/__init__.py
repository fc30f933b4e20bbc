"""Figures of predictions on held-out data, each with an interval."""
