"""Ways to find what every neuron of a ResNet-20 contributes to every class, and their cost."""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neusemslice as nss
from bench import harness
from bench.device import ON_GPU, peak_memory, use_device
from bench.device import wall_seconds as seconds
from bench.report import Column, Ratio, Result

NOTE = (
    "ResNet-20 for 32 × 32 images, every site, fp32, evaluation mode. “added”: share of one "
    "forward pass and one backward pass that finds no weight gradients. Captum: one call per layer "
    "and class, on the class's samples. Hooks: one forward and one whole backward pass, products "
    "in Python. MiB: what one sweep adds to a process's peak memory; of Captum, one call."
)
COLUMNS = (
    Column("batch", "batch", "number"),
    Column("sites", "sites", "number"),
    Column("ms", "ms", "number"),
    Column("overhead", "added", "share", in_summary=True),
    Column("vs_captum", "× Captum", "times", in_summary=True),
    Column("vs_hooks", "× hooks", "times", in_summary=True),
    Column("mib", "MiB", "number"),
    Column("mib_captum", "MiB Captum", "number"),
    Column("mib_hooks", "MiB hooks", "number"),
)


@dataclass(frozen=True)
class Case:
    metric: str
    num_classes: int
    batch: int = 256
    quick: bool = False


CASES = {
    "taylor K=10": Case("taylor", 10, quick=True),
    "taylor K=100": Case("taylor", 100),
    "deeplift K=10": Case("deeplift", 10),
}


class Block(nn.Module):
    """Two convolutions beside a shortcut; each activation is a module of its own, for Captum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


def resnet20(num_classes: int) -> nn.Module:
    """He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2016; random weights."""
    torch.manual_seed(0)
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    ).eval()


class Sweep:
    """One model and one batch, and the ways to find what its neurons contribute."""

    def __init__(self, case: Case, batch: int) -> None:
        self.case = case
        self.model = resnet20(case.num_classes)
        self.x, self.y = torch.randn(batch, 3, 32, 32), torch.arange(batch) % case.num_classes
        self.profiler = nss.Profiler(
            self.model, self.x[:2], (case.metric,), num_classes=case.num_classes
        )
        self.readers = {
            site.name: self.model.get_submodule(site.readers[0].module)
            for site in self.profiler.graph.sites
        }

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y, reduction="none")

    def passes(self) -> None:
        """One forward pass and one backward pass without weight gradients."""
        self.model.requires_grad_(False)
        self.losses(self.x.clone().requires_grad_(), self.y).sum().backward()

    def ours(self) -> None:
        self.model.requires_grad_(False)
        with self.profiler.batch(self.y):
            if self.case.metric == "taylor":
                self.losses(self.x, self.y).sum().backward()
            else:
                self.model(self.x)

    def hooks(self) -> dict[str, Tensor]:
        """Keeps every activation and its gradient until the end of a whole backward pass."""
        self.model.requires_grad_(True)
        kept: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            kept[module] = args[0]

        handles = [m.register_forward_pre_hook(keep) for m in self.readers.values()]
        self.losses(self.x, self.y).sum().backward()
        found: dict[str, Tensor] = {}
        for handle in handles:
            handle.remove()
        for name, module in self.readers.items():
            gradient = kept[module].grad
            assert gradient is not None
            self._add(found, name, kept[module].detach() * gradient, self.y)
        self.model.zero_grad()
        return found

    def captum(self) -> dict[str, Tensor]:
        from captum.attr import LayerDeepLift, LayerGradientXActivation

        self.model.requires_grad_(True)
        found: dict[str, Tensor] = {}
        for name, module in self.readers.items():
            for k in range(self.case.num_classes):
                x, y = self.x[self.y == k], self.y[self.y == k]
                if self.case.metric == "taylor":
                    attributed = LayerGradientXActivation(self.losses, module).attribute(
                        x, additional_forward_args=y, attribute_to_layer_input=True
                    )
                else:
                    attributed = LayerDeepLift(self.model, module).attribute(
                        x, target=k, attribute_to_layer_input=True
                    )
                self._add(found, name, attributed, y)
        return found

    def captum_once(self) -> None:
        """One of Captum's calls, at the first site, on the whole batch."""
        from captum.attr import LayerDeepLift, LayerGradientXActivation

        module = next(iter(self.readers.values()))
        if self.case.metric == "taylor":
            LayerGradientXActivation(self.losses, module).attribute(
                self.x, additional_forward_args=self.y, attribute_to_layer_input=True
            )
        else:
            LayerDeepLift(self.model, module).attribute(
                self.x, target=self.y, attribute_to_layer_input=True
            )

    def _add(self, found: dict[str, Tensor], name: str, product: Tensor, y: Tensor) -> None:
        """Adds each sample's absolute contribution to its class."""
        q = product.detach().flatten(2).mean(2) if product.ndim > 2 else product.detach()
        total = found.setdefault(name, torch.zeros(self.case.num_classes, q.shape[1]))
        total.index_add_(0, y, q.abs())

    def check(self) -> None:
        """Raises unless all ways find the same."""
        self.ours()
        profile = self.profiler.profile
        states = profile.contributions if self.case.metric == "taylor" else profile.lifts
        peers = [self.captum()]
        if self.case.metric == "taylor":
            peers.append(self.hooks())
        for name, state in states.items():
            assert state.mean_abs is not None
            wanted = state.mean_abs * state.count.float().unsqueeze(1)
            for found in peers:
                torch.testing.assert_close(
                    found[name], wanted, rtol=1e-3, atol=1e-5 * float(wanted.max())
                )


def measure(name: str, case: Case, quick: bool, patience: float) -> Result:
    batch = 64 if quick else case.batch
    sweep = Sweep(case, batch)
    taylor = case.metric == "taylor"
    ways: dict[str, Callable[[], object]] = {"captum": sweep.captum}
    if taylor:
        ways |= {"hooks": sweep.hooks, "passes": sweep.passes}
    rounds, own = 3 if quick else 9, []
    slower: dict[str, list[float]] = {way: [] for way in ways}
    sweep.check()
    for i in range(rounds):
        harness.wait_until_quiet(patience)
        mine = seconds(sweep.ours)
        own.append(mine)
        for way, run in ways.items():
            if way != "captum" or i < 3:
                # Against ours before and after it, because the machine's speed drifts.
                took = seconds(run)
                mine, before = seconds(sweep.ours), mine
                slower[way].append(2 * took / (mine + before))
                own.append(mine)
    result = Result(
        name,
        {
            "batch": batch,
            "sites": len(sweep.readers),
            "ms": statistics.median(own) * 1e3,
            "vs_captum": Ratio.of(slower["captum"]),
            "mib": peak("ours", case, batch),
            "mib_captum": peak("captum_once", case, batch),
        },
    )
    if taylor:
        result.values |= {
            "overhead": Ratio.of([1 / ratio - 1 for ratio in slower["passes"]]),
            "vs_hooks": Ratio.of(slower["hooks"]),
            "mib_hooks": peak("hooks", case, batch),
        }
    return result


def peak(way: str, case: Case, batch: int) -> float:
    """MiB by which one way raises the peak memory of a process that went it with a small batch."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (way, case, batch))


def _peak(way: str, case: Case, batch: int) -> float:
    use_device()
    getattr(Sweep(case, case.num_classes), way)()
    sweep = Sweep(case, batch)
    if ON_GPU:
        with peak_memory() as found:
            getattr(sweep, way)()
        return found[0]
    before = _kibibytes("VmHWM")
    getattr(sweep, way)()
    return (_kibibytes("VmHWM") - before) / 1024


def _kibibytes(name: str) -> int:
    """A line of what Linux says of this process; getrusage would begin with its parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0])
