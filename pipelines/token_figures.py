"""What a run says of each validation token at its end: ``tokens.npz`` in its folder.

Shape legend: T validation tokens, in the order of the windows; the same for every run on the same text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TokenFigures:
    """Three columns."""

    ids_T: npt.NDArray[np.int32]
    """The token that is read."""
    losses_T: npt.NDArray[np.float32]
    """Nats of predicting the next one."""
    experts_T: npt.NDArray[np.int32]
    """Real experts that it passes, summed over the MoE layers; identity experts are none."""

    def write(self, path: Path) -> None:
        """Write it without pickle; the file is whole or not there."""
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            np.savez_compressed(file, ids=self.ids_T, losses=self.losses_T, experts=self.experts_T)
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Inverse of `write`."""
        with np.load(path, allow_pickle=False) as columns:
            return cls(columns["ids"], columns["losses"], columns["experts"])
