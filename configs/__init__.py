"""The Hydra configuration of `train.py`: one folder per group."""
