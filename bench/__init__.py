"""Benchmarks: scripts that are run by hand; shared/ holds what several of them use."""
