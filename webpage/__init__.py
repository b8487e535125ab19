"""The report of a run as one HTML file: what it shows (run_data), the splines in it (packing), the page (build)."""
