"""Edit streams: where requests come from, and in what protocol they are written."""
