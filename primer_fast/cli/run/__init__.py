"""What every run in a folder shares: its options, files, checkpoints and end."""
