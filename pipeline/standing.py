"""Where stages stand, result files included: what `kdpipe status` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kdpipe.pipeline.plan import StageStatus, status_of
from kdpipe.stages.base import Context, StagePlan
from kdpipe.stages.evaluate.results import assembled


def standing(ctx: Context, plans: Mapping[str, StagePlan]) -> list[StageStatus]:
    """The status of each stage. One whose samples are all done is not fresh while its result files are of others, as
    after a crash between the last answer and `scores.json`."""
    statuses = []
    for plan in plans.values():
        status = status_of(plan)
        if plan.stage == "evaluate" and status.state == "fresh" and plan.wanted and not assembled(ctx):
            why = "scores.json and predictions.parquet are not of these answers yet"
            status = replace(status, state="partial", reasons=(*status.reasons, why))
        statuses.append(status)
    return statuses
