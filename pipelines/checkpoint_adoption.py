"""Another run's checkpoint in place of a run's own: how a population hands states on. Imports no torch."""

import shutil
from pathlib import Path

from pipelines.checkpoint_manifest import MANIFEST, checkpoint_folders, step_of
from pipelines.checkpoint_standing import STANDING


def adopt(folder: Path, checkpoint: Path) -> None:
    """Make a copy of ``checkpoint`` the newest of those in ``folder``; its own of that step and later ones are deleted.

    What the other run thought of it is not copied: it is unconfirmed here. For one rank only, while no rank trains. A
    second time it does the same again.
    """
    draft = folder / f".adopted-{checkpoint.name}"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(checkpoint, draft, ignore=shutil.ignore_patterns(STANDING))
    for path in checkpoint_folders(folder):
        if step_of(path) >= step_of(checkpoint):
            # First the manifest: a removal that is cut short must not leave what looks like a checkpoint.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
    draft.rename(folder / checkpoint.name)
