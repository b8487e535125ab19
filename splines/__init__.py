"""Splines as plain arrays: nothing here knows a layer or a model."""
