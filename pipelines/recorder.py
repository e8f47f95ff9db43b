"""What a training run records of its steps, for MLflow, for pictures and for people."""

from collections.abc import Mapping, Sequence

from moe.config.schedule import StagedSchedule
from moe.counting import count_parameters
from moe.report import Report
from pipelines.config import RunConfig
from pipelines.history import WindowMaximum
from pipelines.notes import Note, add_note
from pipelines.run_folder import RunFolder
from pipelines.spool import START, TRAIN, VALIDATION, SpoolReader, SpoolWriter


class Recorder:
    """Appends records to the run's spool on rank 0, and does nothing elsewhere."""

    def __init__(self, config: RunConfig, folder: RunFolder, rank: int, start_step: int) -> None:
        self.config = config
        self._stages = config.schedule.as_stages() if isinstance(config.schedule, StagedSchedule) else []
        self.loss_max = WindowMaximum(config.steps, config.tracking.every_steps)
        self._writer = None
        self._folder = folder
        self._recorded = 0
        self._stage = 0
        if rank == 0:
            self._writer = SpoolWriter(folder.spool)
            self._recorded = self._writer.last_step(TRAIN)
            self.loss_max.restore(SpoolReader(folder.spool).read(), start_step)

    def model(self) -> None:
        """Record how large the model is."""
        size = count_parameters(self.config.model)
        figures = {"model/parameters": size.total, "model/active_parameters": size.active}
        self._write(START, 0, {name: float(figure) for name, figure in figures.items()})

    def make_up(self, rewinds: Sequence[int]) -> None:
        """Record the rewinds that a worker was killed before it had recorded; ``rewinds`` are all there were."""
        if self._writer is not None:
            for step in rewinds[self._writer.rewinds :]:
                self._writer.rewind(step)
            self._recorded = self._writer.last_step(TRAIN)

    def rewind(self, step: int) -> None:
        """Record that training went back to the state after ``step``."""
        if self._writer is not None:
            self._writer.rewind(step)
            self._recorded = min(self._recorded, step)
            self.loss_max.restore(SpoolReader(self._folder.spool).read(), step)

    def step(self, report: Report, seconds: float, spikes: int, is_spike: bool) -> None:
        """Record an optimizer step that took ``seconds``; there were ``spikes`` so far, this step included."""
        moment = report.moment
        metrics = dict(report.metrics)
        metrics["train/tokens_per_second"] = moment.global_batch_size * moment.sequence_length / seconds
        if self._stages:
            metrics["train/stage"] = moment.stage + 1
            self._note_stage(report)
        metrics["spike/count"] = float(spikes)
        if is_spike:
            metrics["spike/loss_at_spike"] = metrics["train/loss"]
        maximum = self.loss_max.update(report.step, metrics["train/loss"])
        if maximum is not None:
            metrics["train/loss_max"] = maximum
        if self.config.tracking.per_layer:
            metrics |= {f"moe_max_vio/layer_{i:02}": v for i, v in enumerate(report.layer_max_vio)}
            metrics |= report.health.by_layer() if report.health is not None else {}
        is_due = report.step % self.config.tracking.every_steps == 0 or report.step == moment.steps
        if is_due or not report.taken or is_spike or report.health is not None:
            self._write(TRAIN, report.step, metrics)

    def _note_stage(self, report: Report) -> None:
        """Say that a stage begins; steps that a resumed run repeats have been told of already."""
        moment = report.moment
        if moment.stage != self._stage and report.step > self._recorded and self._writer is not None:
            stages, batch = len(self._stages), f"{moment.global_batch_size} x {moment.sequence_length} tokens"
            text = f"step {report.step}: stage {moment.stage + 1} of {stages} begins, with batches of {batch}"
            add_note(self._folder.notes, Note("stage", text))
        self._stage = moment.stage

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record a validation."""
        self._write(VALIDATION, step, metrics)

    def _write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(kind, step, metrics)

    def close(self) -> None:
        """Finish the spool."""
        if self._writer is not None:
            self._writer.close()
