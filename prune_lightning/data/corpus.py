"""Text for statistics from text or JSONL files, a folder of them, or a hub data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from prune_lightning.errors import UserError, near_path, shown
from prune_lightning.models.corpora import CorpusUnavailable
from prune_lightning.models.loading import hub_is_offline
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
        if not (files := self._files()):
            return self.samples
        with ExitStack() as stack:
            lines = (line for file in files for line in stack.enter_context(file.open("rb")) if line.strip())
            return sum(1 for _ in islice(lines, self.samples))

    def check(self) -> None:
        """Read all texts of local files, or the first one of a data set, and drop them.

        Raises:
            UserError: The corpus does not exist, cannot be read, or holds no text.
        """
        texts = self.texts() if self._files() else islice(self.texts(), 1)
        if not any([bool(text.strip()) for text in texts]):
            raise UserError(f"the statistics corpus {self.path!r} holds no text")

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
            raise UserError(
                f"the statistics corpus {self.path!r} does not exist: {near_path(Path(self.path).expanduser())}"
            )
        else:
            source = self._dataset()
        return islice(source, self.samples)

    def _file(self, file: Path) -> Iterator[str]:
        """Yield the texts of a file; empty lines are none."""
        with file.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                    if line.strip():
                        yield line if file.suffix not in (".jsonl", ".json") else self._field(json.loads(line))
                except (ValueError, UserError) as error:  # of the encoding, or of JSON
                    raise UserError(f"the statistics corpus {file}, line {number}: {error}") from error

    def _field(self, row: Any) -> str:
        text = row.get(self.field) if isinstance(row, Mapping) else None
        if not isinstance(text, str):
            raise UserError(f"expected an object with a text under {self.field!r}, but got {shown(row)}")
        return text

    def _dataset(self) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise CorpusUnavailable(
                f"the statistics corpus {self.path!r} is no local file; to load it as a hub data set, "
                "`pip install 'prune-lightning[hub]'`, or give model.second_moments.corpus.path=FILE"
            ) from error
        if hub_is_offline():
            raise CorpusUnavailable(
                f"the statistics corpus {self.path!r} is no local file, and the hub cannot be reached; give "
                "model.second_moments.corpus.path=FILE"
            )
        try:
            rows: Iterator[Any] = iter(load_dataset(self.path, self.name, split=self.split, streaming=True))
        except Exception as error:  # the library and the network raise many kinds
            reason = " ".join(str(error).split())
            raise CorpusUnavailable(f"the statistics corpus {self.path!r} cannot be loaded: {reason}") from error
        for row in rows:
            yield self._field(row)
