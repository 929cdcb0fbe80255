"""Edit streams: the sources of requests, and the protocols in which they are written."""
