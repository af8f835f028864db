"""Linear algebra on long vectors that backends share: what it asks of a vector, and solvers that ask no more."""
