"""Rules about text alone: scripts, where a subject stands, what stands between a prompt and its target."""
