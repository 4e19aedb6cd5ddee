"""What a run leaves on disk: its folder, record, events, checkpoints, traces, and the W&B mirror."""
