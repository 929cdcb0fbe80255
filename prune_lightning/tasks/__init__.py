"""The jobs of `train.py`, chosen by `task=` in the configuration."""
