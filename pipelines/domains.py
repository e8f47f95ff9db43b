"""Classes of documents, by their names: which expert bias routes a token (``data.domains``)."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from pipelines.shards import TokenStream


class DocumentClasses:
    """The class of every token of a stream."""

    def __init__(self, stream: TokenStream, patterns: Sequence[Sequence[str]]) -> None:
        """``patterns``: those of class 1, of class 2 and so on; the first class with a match wins, class 0 has none."""
        self._stream = stream
        self._patterns = patterns
        self._known: dict[str, int] = {}

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Classes of tokens ``start`` to ``stop`` (exclusive); the token that ends a document is of the document's."""
        spans = self._stream.documents(start, stop)
        return np.repeat([self.of(span.name) for span in spans], [span.end - span.start for span in spans])

    def of(self, name: str) -> int:
        """The class of the document of that name. Looked at once: names outnumber patterns by far."""
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = self._match(name)
        return known

    def _match(self, name: str) -> int:
        for number, patterns in enumerate(self._patterns, start=1):
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                return number
        return 0


def document_classes(stream: TokenStream, patterns: Sequence[Sequence[str]]) -> DocumentClasses | None:
    """The classes of ``stream`` by ``data.domains``; None where that lists none."""
    return DocumentClasses(stream, patterns) if patterns else None
