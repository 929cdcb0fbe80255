"""Continual learning by model editing, with PRUNE and PyTorch Lightning."""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from prune_lightning.editor import Editor

__all__ = ["Editor", "__version__"]

__version__ = "0.1.0"

# In a checkout `callbacks/` and `configs/` are next to this package; an installed wheel has them inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "callbacks" / "__init__.py").is_file():
    __path__.append(str(_root))


def __getattr__(name: str) -> _Any:
    """Import the editor on first use: it needs torch and Lightning, which take seconds."""
    if name == "Editor":
        from prune_lightning.editor import Editor

        return Editor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
