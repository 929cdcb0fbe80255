"""Language models as an editor sees them: families, loading, tokenisation, hooks, statistics."""
