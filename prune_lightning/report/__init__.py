"""What a run leaves: summary, table, plots, a page."""
