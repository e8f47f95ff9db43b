"""A small corpus on disk, and what its token streams must be, worked out plainly from the documents."""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import DataConfig, FilesCorpusConfig

DOCUMENT = 256  # the byte tokenizer's document token


@dataclass
class PlainCorpus:
    folder: Path
    documents: dict[str, bytes]

    def config(self, **changes: object) -> DataConfig:
        return DataConfig.model_validate({"corpus": FilesCorpusConfig(paths=[str(self.folder)]), **changes})

    def train(self) -> list[tuple[str, int]]:
        """(document, token) in stream order, for the byte tokenizer."""
        return _stream((name, self.documents[name]) for name in sorted(self.documents) if not self._held_out(name))

    def validation(self) -> list[tuple[str, int]]:
        held_out = [name for name in self.documents if self._held_out(name)]
        held_out.sort(key=lambda name: (hashlib.sha256(self.documents[name]).hexdigest(), name))
        return _stream((name, self.documents[name]) for name in held_out)

    def _held_out(self, name: str) -> bool:
        return held_out(self.documents[name])


def held_out(content: bytes) -> bool:
    return int(hashlib.sha256(content).hexdigest()[:16], 16) / 16**16 < 0.05


def _stream(documents: Iterable[tuple[str, bytes]]) -> list[tuple[str, int]]:
    return [(name, token) for name, content in documents for token in [*content, DOCUMENT]]


def write_corpus(folder: Path, documents: int = 120, longest: int = 400, seed: int = 0) -> PlainCorpus:
    """Documents of 1 to ``longest`` bytes of UTF-8 text in nested folders."""
    rng = random.Random(seed)
    written = {}
    for number in range(documents):
        name = f"{rng.choice(['a', 'b/c', 'd'])}/{number:03}.txt"
        size = rng.randint(1, longest)
        content = "".join(rng.choices("abc é\n🙂", (9, 5, 3, 3, 1, 1, 1), k=size)).encode()[:size]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written[name] = content
    return PlainCorpus(folder, written)
