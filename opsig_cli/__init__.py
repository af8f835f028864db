"""opsig: find the opposing groups of samples that make training loss oscillate and spike."""
