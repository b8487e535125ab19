"""What surrounds the model in a run: data, batches, configuration, optimiser, checkpoints, logging."""
