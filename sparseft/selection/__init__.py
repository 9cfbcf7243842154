"""Which entries train."""
