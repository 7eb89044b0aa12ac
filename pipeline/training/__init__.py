"""Engine, trainer, checkpoints, meters."""
