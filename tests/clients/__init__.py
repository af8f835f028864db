"""Checkpoints as the libraries that people train with write them, and what is right of each."""
