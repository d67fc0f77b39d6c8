"""What model files say about themselves, read from their headers only; weights are never read."""
