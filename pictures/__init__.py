"""Splines on paper."""
