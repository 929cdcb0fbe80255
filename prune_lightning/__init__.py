"""Continual learning by model editing, with PRUNE and PyTorch Lightning."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout `callbacks/` and `configs/` are next to this package; an installed wheel has them inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "callbacks" / "__init__.py").is_file():
    __path__.append(str(_root))
