"""From a slice to a restructured, re-adapted or extended model."""

from neusemslice.maintain.compensate import Refit
from neusemslice.maintain.compress import Compressed, CompressReport, compress
from neusemslice.maintain.cost import Cost, latency, measure, parameter_count
from neusemslice.maintain.delta import Delta
from neusemslice.maintain.extend import Extended, ExtendReport, extend
from neusemslice.maintain.finetune import finetune
from neusemslice.maintain.readapt import Readapted, ReadaptReport, readapt
from neusemslice.maintain.recalibration import recalibrate
from neusemslice.maintain.regrow import regrow
from neusemslice.maintain.restructure import Restructured, RestructureReport, restructure
from neusemslice.maintain.targets import GroupPlan, Plan, plan
from neusemslice.maintain.tasks import Task, TaskModel
from neusemslice.maintain.training import Score, Training, fit, score
from neusemslice.maintain.undo import Undo

__all__ = [
    "CompressReport",
    "Compressed",
    "Cost",
    "Delta",
    "ExtendReport",
    "Extended",
    "GroupPlan",
    "Plan",
    "ReadaptReport",
    "Readapted",
    "Refit",
    "RestructureReport",
    "Restructured",
    "Score",
    "Task",
    "TaskModel",
    "Training",
    "Undo",
    "compress",
    "extend",
    "finetune",
    "fit",
    "latency",
    "measure",
    "parameter_count",
    "plan",
    "readapt",
    "recalibrate",
    "regrow",
    "restructure",
    "score",
]
