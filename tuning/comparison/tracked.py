"""A comparison's own run in MLflow: its report is an artifact, and what was compared is its config."""

from typing import Self

from pydantic import BaseModel

from pipelines.ending import DESCRIPTION_TAG
from pipelines.home import comparisons_dir
from pipelines.loading import dump_config
from pipelines.run_folder import comparison_folders, count_on
from pipelines.tracking_store import TrackingStore
from tuning.comparison.comparing import Comparison
from tuning.comparison.page import describe
from tuning.parent_run import ParentRun, make_parent

_TAG_LENGTH = 5000


class ComparedRuns(BaseModel):
    """What was compared: ``config.yaml`` of a comparison."""

    title: str
    runs: dict[str, str]
    """Names by MLflow's ids."""


class ComparisonRun(ParentRun):
    """The run of a comparison, in the experiment of the first of the runs."""

    @classmethod
    def begin(cls, comparison: Comparison, store: TrackingStore) -> Self:
        """A new comparison. UserError if the store refuses."""
        compared = ComparedRuns(title=comparison.title, runs={run.info.id: run.info.name for run in comparison.runs})
        description = describe(comparison)
        folder, lock = make_parent(
            store,
            comparisons_dir(),
            count_on("compare", {folder.info.name for folder in comparison_folders()}),
            comparison.runs[0].info.experiment,
            tags={
                "role": "compare",
                "compare.runs": ", ".join(compared.runs.values())[:_TAG_LENGTH],
                DESCRIPTION_TAG: description,
            },
            params={"runs": str(len(compared.runs)), "keys": ", ".join(comparison.keys) or "none"},
            files={"config.yaml": dump_config(compared)},
        )
        run = cls(store, folder, lock, description)
        run.figures = {
            "compare/runs": float(len(comparison.runs)),
            "compare/configurations": float(len(comparison.configurations)),
            "compare/diverged": float(len(comparison.diverged)),
        }
        return run
