"""Run one job from its configuration: `python train.py --help` shows the groups, `configs/train.yaml` the keys."""

from prune_lightning.cli import main

if __name__ == "__main__":
    main()
