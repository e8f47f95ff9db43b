"""The saved view of studies, against what a trial records."""

from pipelines.saved_view import BarChart
from pipelines.views import STUDIES
from tuning.measure_names import MEASURES


def test_what_is_on_the_view_is_what_trials_record() -> None:
    recorded = {f"study/{measure}" for measure in MEASURES}
    bars = {chart.metric for section in STUDIES.sections for chart in section.charts if isinstance(chart, BarChart)}
    columns = {column.removeprefix("metrics.") for column in STUDIES.columns if column.startswith("metrics.")}
    assert bars <= recorded
    assert columns <= recorded
