"""The training loop, stages, the run folder's files and the log."""
