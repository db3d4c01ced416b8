"""Who serves: the life of a request, from admission to its last token. Knows nothing of HTTP or argv."""
