"""A run measured in independent parts, each into a file of its own, and how they come back: `share`, `merging`."""
