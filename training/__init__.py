"""A run of training: its configuration, optimizer, evaluation, checkpoints and logs."""
