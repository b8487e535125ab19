"""Pictures of splines, drawn with matplotlib from snapshots."""
