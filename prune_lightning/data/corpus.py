"""Text for statistics from text or JSONL files, a folder of them, or a hub data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from prune_lightning.errors import UserError
from prune_lightning.ranges import Count


class TextCorpus:
    """Texts, one per line of a ``.txt`` file, one per object of a ``.jsonl`` file, or one per row of a data set.

    Args:
        path: A file, a folder of such files, or the name of a ``datasets`` data set.
        name: Configuration of the data set.
        split: Split of the data set.
        field: Key of the text in JSONL and data sets.
        samples: Use at most this many texts.
    """

    def __init__(
        self, path: str, name: str | None = None, split: str = "train", field: str = "text", samples: Count = 100_000
    ) -> None:
        self.path, self.name, self.split, self.field, self.samples = path, name, split, field, samples

    def __len__(self) -> int:
        return self.samples

    def _files(self) -> list[Path]:
        local = Path(self.path).expanduser()
        if local.is_dir():
            return sorted(path for path in local.iterdir() if path.is_file())
        return [local] if local.exists() else []

    def identity(self) -> str:
        """Return a string that identifies the texts: a digest of local files, or a data set's name."""
        settings = f"field={self.field} samples={self.samples}"
        if not (files := self._files()):
            return f"{self.path} {self.name} {self.split} {settings}"
        digest = hashlib.blake2b(digest_size=16)
        for path in files:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return f"{digest.hexdigest()} {settings}"

    def texts(self) -> Iterator[str]:
        """Yield the texts."""
        if files := self._files():
            source: Iterator[str] = (text for file in files for text in self._file(file))
        elif self.path.startswith((".", "~", "/")) or self.path.count("/") > 1:
            raise UserError(f"the statistics corpus {self.path!r} does not exist")
        else:
            source = self._dataset()
        return islice(source, self.samples)

    def _file(self, file: Path) -> Iterator[str]:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if file.suffix not in (".jsonl", ".json"):
                    yield line
                    continue
                try:
                    yield json.loads(line)[self.field]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{file}, line {number}: expected an object with {self.field!r}: {error}"
                    ) from error

    def _dataset(self) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise UserError(
                f"the statistics corpus {self.path!r} is no local file; to load it as a hub data set, "
                "`pip install 'prune-lightning[hub]'`, or give model.second_moments.corpus.path=FILE"
            ) from error
        for row in load_dataset(self.path, self.name, split=self.split, streaming=True):
            yield row[self.field]
