"""The jobs that `train.py` runs; `task=` in the configuration names one."""
