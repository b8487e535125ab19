"""Measurements: what is run by hand, and what they share."""
