"""Pure functions over arrays (numpy, scipy, scikit-learn): no files, no printing, nothing of ours but each other."""
