"""Raw files, on this machine or behind a URL, and the rows in them."""
