"""The HTML page of a run: `content` says what stands in it, `page` makes it one file, the rest draws."""
