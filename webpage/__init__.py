"""Makes the report of a run, one HTML file: its data (run_data), its splines (packing, maps) and its page (build)."""
