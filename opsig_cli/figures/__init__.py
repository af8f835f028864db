"""Pictures from arrays. Every function saves one file whole or not at all, and the same input gives the same bytes."""
