"""Splines as plain arrays: nothing in this package imports a layer or a model."""
