"""Verbs of the command line that start a job of ``train.py`` or the playground, and what all verbs share."""
