"""Rules about text: scripts, positions of subjects, separators between prompts and targets."""
