"""Groups and opposing pairs of a run: finding them, weighing their evidence, and saying what was found."""
