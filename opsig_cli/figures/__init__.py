"""Pictures from arrays. Every page is a matplotlib Figure, and the same input gives the same bytes when it is saved."""
