"""From a slice to a restructured, re-adapted or extended model."""

from neusemslice.maintain.capacity import Capacity, SiteCapacity, capacity_left
from neusemslice.maintain.compensate import Refit
from neusemslice.maintain.compress import Compressed, CompressReport, compress
from neusemslice.maintain.consolidate import Consolidation
from neusemslice.maintain.continual import (
    TaskAccuracy,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    task_accuracies,
)
from neusemslice.maintain.cost import Cost, latency, measure, parameter_count
from neusemslice.maintain.delta import Delta
from neusemslice.maintain.extend import Extended, ExtendReport, extend
from neusemslice.maintain.finetune import finetune
from neusemslice.maintain.readapt import Readapted, ReadaptReport, readapt
from neusemslice.maintain.recalibration import recalibrate
from neusemslice.maintain.regrow import regrow
from neusemslice.maintain.restructure import Restructured, RestructureReport, restructure
from neusemslice.maintain.targets import GroupPlan, Plan, plan
from neusemslice.maintain.taskfiles import export_task, load_tasks, save_tasks
from neusemslice.maintain.tasks import Task, TaskSet
from neusemslice.maintain.training import Score, Training, fit, score
from neusemslice.maintain.undo import Undo

__all__ = [
    "Capacity",
    "CompressReport",
    "Compressed",
    "Consolidation",
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
    "SiteCapacity",
    "Task",
    "TaskAccuracy",
    "TaskSet",
    "Training",
    "Undo",
    "average_accuracy",
    "backward_transfer",
    "capacity_left",
    "compress",
    "export_task",
    "extend",
    "finetune",
    "fit",
    "forgetting",
    "forward_transfer",
    "latency",
    "load_tasks",
    "measure",
    "parameter_count",
    "plan",
    "readapt",
    "recalibrate",
    "regrow",
    "restructure",
    "save_tasks",
    "score",
    "task_accuracies",
]
