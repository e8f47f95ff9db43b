"""The checkpoints of a run in MLflow: each that is on the disk is a logged model, and each that is gone is not.

MLflow gets no files: a logged model says where the checkpoint lies, which run made it, and how good it was then. Found
under Models in the UI, and in the column Models of its table of runs. It is no output of the run (``log_outputs``):
those cannot be taken back, and a long run makes and drops thousands.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.checkpoint_manifest import step_of, whole_checkpoints
from pipelines.run_folder import RunFolder, read_json, write_json
from pipelines.spool import records_of_step

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

MODEL_TYPE = "checkpoint"
_METRICS = ("train/loss", "val/loss", "val/nats_per_byte", "moe/max_vio_global")
_UNFIT_FOR_A_NAME = re.compile(r"""[/:.%"']+""")


class CheckpointRegistry:
    """What MLflow knows of a run's checkpoints; ``registered.json`` in the run's folder remembers it by their names.

    That file is written after the fact. A crash in between leaves a model that is found again: the first call looks.
    """

    def __init__(self, client: "MlflowClient", folder: RunFolder) -> None:
        self._client = client
        self._folder = folder
        self._registered: dict[str, str] = read_json(folder.registered)
        self._found: dict[str, LoggedModel] | None = None

    def send(self) -> None:
        """Register what is new, delete what is gone.

        Raises:
            MlflowException, SQLAlchemyError, OSError: the store does not take it; the next call goes on from there.
        """
        there = whole_checkpoints(self._folder.checkpoints)
        if self._found is None:
            self._found = self._find()
        for name in self._found.keys() - there.keys() - self._registered.keys():
            self._delete(self._found[name].model_id)
        new, gone = self._differences(there)
        for name in new:
            self._registered[name] = self._register(there[name], self._found.get(name))
            write_json(self._folder.registered, self._registered)
        for name in gone:
            self._delete(self._registered[name])
            del self._registered[name]
            write_json(self._folder.registered, self._registered)

    def left(self) -> int:
        """Checkpoints of which MLflow does not know yet that they are there, or gone."""
        new, gone = self._differences(whole_checkpoints(self._folder.checkpoints))
        return len(new) + len(gone)

    def _differences(self, there: dict[str, Path]) -> tuple[list[str], list[str]]:
        return [name for name in there if name not in self._registered], sorted(self._registered.keys() - there.keys())

    def _find(self) -> dict[str, "LoggedModel"]:
        """This run's checkpoints that MLflow has, by name of their folder."""
        found: dict[str, LoggedModel] = {}
        token = None
        while True:
            page = self._client.search_logged_models(
                [self._folder.info.experiment_id],
                filter_string=f"source_run_id = '{self._folder.info.id}' AND model_type = '{MODEL_TYPE}'",
                page_token=token,
            )
            found |= {Path(model.params["path"]).name: model for model in page}
            token = page.token
            if not token:
                return found

    def _register(self, path: Path, model: "LoggedModel | None") -> str:
        """Make the model, or finish the one that an earlier attempt has made, and return its id."""
        from mlflow.entities import LoggedModelStatus

        info = self._folder.info
        if model is None:
            model = self._client.create_logged_model(
                info.experiment_id,
                # The run's name first: the UI's list of models has nothing else to tell runs apart at a glance.
                name=_UNFIT_FOR_A_NAME.sub("-", f"{info.name}-{path.name.replace('-', '')}"),
                source_run_id=info.id,
                params={"step": str(step_of(path)), "path": str(path.absolute())},
                model_type=MODEL_TYPE,
            )
        if metrics := list(self._metrics(path, model.model_id)):
            # Points that the run has already; what is new is that the model has them too.
            self._client.log_batch(info.id, metrics=metrics, synchronous=True)
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return str(model.model_id)

    def _metrics(self, path: Path, model_id: str) -> Iterator["Metric"]:
        from mlflow.entities import Metric

        for record in records_of_step(self._folder.spool, step_of(path)):
            for name, value in record.metrics.items():
                if name in _METRICS:
                    yield Metric(name, value, record.time_ms, record.step, model_id=model_id)

    def _delete(self, model_id: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.delete_logged_model(model_id)
        except MlflowException as error:
            # The user may have deleted it in the UI.
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
