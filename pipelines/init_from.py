"""What the driver does for a run that starts from given weights: check all of them before anything is started."""

from pathlib import Path

from rich.console import Console

from pipelines.checkpoint_manifest import checkpoint_folders
from pipelines.config import RunConfig
from pipelines.hf_tokenizer import refuse_another_vocabulary, training_tokenizer_json
from pipelines.hf_weights import check_weights
from pipelines.prepare import tokenizer_of
from pipelines.run_folder import RunFolder


def check_start(weights: Path | None, resumed: RunFolder | None, config: RunConfig, console: Console) -> None:
    """Check the weights that a run starts from against its model and its text, and say what is taken from them.

    A resumed run that has saved a checkpoint does not need them any more.

    Raises:
        UserError: they do not fit; one line.
    """
    if weights is None or (resumed is not None and checkpoint_folders(resumed.checkpoints)):
        return
    has_mtp = check_weights(weights, config.model)
    tokenizer = tokenizer_of(config.data)
    notes = [f"weights: {weights}; the optimizer starts anew"]
    if not refuse_another_vocabulary(weights, training_tokenizer_json(tokenizer), tokenizer.name):
        notes.append("it has no tokenizer.json, so its vocabulary could not be compared with that of the text")
    if has_mtp:
        notes.append("its multi-token prediction is not read")
    if config.model.mtp.depth:
        notes.append("multi-token prediction starts from random weights")
    console.print("; ".join(notes), highlight=False, soft_wrap=True, markup=False)
