"""One trainer: windows, draws, reduction, metrics, checkpoints, optimizer."""
