"""What a run says of each validation token at its end: ``tokens.npz`` in its folder.

Shape legend: T validation tokens, in the order of the windows; the same for every run on the same text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from moe.token_figures import token_figures
from moe.trainer import Trainer
from pipelines.data import ValidationBatches


@dataclass(frozen=True)
class TokenTable:
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


def tabulate(trainer: Trainer, held_out: ValidationBatches) -> TokenTable:
    """The figures of every validation token, the same on every rank. Collective; training state is not touched."""
    table_3T = torch.zeros((3, held_out.num_targets), dtype=torch.float64, device=trainer.ranks.device)
    for first, batch in zip(held_out.first_targets, held_out, strict=True):
        figures = token_figures(trainer.model, batch.to(trainer.ranks.device))
        rows = (figures.ids_T, figures.losses_T, figures.real_experts_T)
        table_3T[:, first : first + len(figures.ids_T)] = torch.stack([row.double() for row in rows])
    # Every token is one rank's, so that sums are plain copies.
    ids, losses, experts = trainer.ranks.sum_over_world(table_3T).cpu().numpy()
    return TokenTable(ids.astype(np.int32), losses.astype(np.float32), experts.astype(np.int32))
