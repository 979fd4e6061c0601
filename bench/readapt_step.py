"""A whole training step, forward, backward and optimizer, when few neurons are tuned.

python -m bench.readapt_step            5, 10 and 25 % of the neurons, writes bench/results/
python -m bench.readapt_step --quick    10 %, small batches, few layers, nothing written

Against full fine-tuning with torch's fused AdamW, masks on the gradients of the tuned parameters
(wrong besides: decay moves what is masked), and PEFT's LoRA and SHiRA with about as many trained
parameters. The last line is one JSON object: per workload `limit`, the time of a step that trains
one vector at the lowest tuned layer, and so finds no weight's gradient, over ours; `vs_full`,
`vs_hook`, `vs_lora` and `vs_shira`, how many times longer the peer's step takes; and `memory`, how
many times more bytes of optimizer state full fine-tuning holds. A round runs every way once.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import neusemslice as nss
from bench import cifar
from bench.report import Column, Ratio, Result, Section
from neusemslice.graph import Inputs, logits_of, trace

CLASSES = 10
SHARES = (0.05, 0.10, 0.25)
COLUMNS = (
    Column("tuned", "tuned parameters", "share"),
    Column("ms", "step ms", "number"),
    Column("rate", "steps/s", "number"),
    Column("state", "optimizer MiB", "number"),
    Column("states", "of the others", "text"),
    Column("peak", "peak MiB", "number"),
    Column("peaks", "of the others", "text"),
    Column("limit", "of limit", "share", in_summary=True),
    Column("vs_full", "× full", "times", in_summary=True),
    Column("vs_hook", "× mask hooks", "times", in_summary=True),
    Column("vs_lora", "× LoRA", "times", in_summary=True),
    Column("vs_shira", "× SHiRA", "times", in_summary=True),
    Column("memory", "× optimizer bytes, full", "times", in_summary=True),
)
NOTE = (
    "fp32, random weights and data; statistics of batch norms frozen and no dropout, in every way. "
    "Neurons are drawn at random over all layers; “tuned parameters” is what they own. “of limit”: "
    "the time of a step that goes back to the lowest tuned layer and finds no weight's gradient, "
    "over ours. “peak”: by how much a way's model, gradients, state and step raise the process's "
    "memory. LoRA and SHiRA train about as many parameters; SHiRA knows linear layers only. The "
    "others: full, mask hooks, LoRA, SHiRA."
)


@dataclass(frozen=True)
class Workload:
    """A model, its batch, and the layers that PEFT adapts."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    batch: int
    adapted: str


def resnet20(batch: int) -> Workload:
    return Workload(
        lambda: cifar.ResNet(3, CLASSES),
        lambda: Inputs((torch.randn(batch, 3, 32, 32),)),
        batch,
        r".*conv\d",
    )


def vit_small(batch: int, layers: int) -> Workload:
    config = ViTConfig(
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_labels=CLASSES,
    )
    return Workload(
        lambda: ViTForImageClassification(config),
        lambda: Inputs((torch.randn(batch, 3, 224, 224),)),
        batch,
        LINEAR,
    )


def bert_base(batch: int, layers: int) -> Workload:
    config = BertConfig(
        num_hidden_layers=layers,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return Workload(
        lambda: BertForSequenceClassification(config),
        lambda: Inputs((torch.randint(0, config.vocab_size, (batch, 128)),)),
        batch,
        LINEAR,
    )


# The linear layers of every block, in either library's names.
LINEAR = r".*(query|key|value|dense|q_proj|k_proj|v_proj|o_proj|fc\d)"


def training(model: nn.Module) -> nn.Module:
    """In training mode, but for modules with running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def drawn(model: nn.Module, inputs: Inputs, share: float) -> nss.Slice:
    """Each neuron with the probability `share`, at least one of the first site's."""
    graph = trace(model.eval(), inputs.head(2))
    generator = torch.Generator().manual_seed(1)
    masks = {s.name: torch.rand(s.neurons, generator=generator) < share for s in graph.sites}
    masks[graph.sites[0].name][0] = True
    return nss.Slice(graph, masks)


@dataclass
class Way:
    """A model in training: what a step needs, and the block that it runs in."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    block: AbstractContextManager[Any]

    def step(self, inputs: Inputs, labels: Tensor) -> None:
        loss = F.cross_entropy(logits_of(inputs.run(self.model)), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state_bytes(self) -> int:
        states = self.optimizer.state.values()
        return sum(t.nbytes for s in states for t in s.values() if isinstance(t, Tensor))


def ours(workload: Workload, tuned: nss.Slice) -> Way:
    model = training(workload.model())
    block = nss.optim.row_gradients(model, tuned.parameters(model))
    rows = block.__enter__()
    return Way(model, nss.optim.MaskedAdamW(rows.groups(), lr=1e-4), block)


def full(workload: Workload, tuned: nss.Slice) -> Way:
    model = training(workload.model())
    return Way(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), nullcontext())


def hooks(workload: Workload, tuned: nss.Slice) -> Way:
    model = training(workload.model()).requires_grad_(False)
    (group,) = tuned.parameters(model)
    for parameter, rows, dim in zip(
        *(group[k] for k in ("params", "rows", "neuron_dims")), strict=True
    ):
        mask = torch.zeros_like(parameter).index_fill_(dim, rows, 1.0)
        parameter.requires_grad_().register_hook(lambda grad, mask=mask: grad * mask)
    return Way(model, torch.optim.AdamW(group["params"], lr=1e-4, fused=True), nullcontext())


def least(workload: Workload, tuned: nss.Slice) -> Way:
    """Trains the first vector of the tuned neurons' alone: backward has to go as far down."""
    model = training(workload.model())
    (group,) = tuned.parameters(model)
    vector = next(parameter for parameter in group["params"] if parameter.dim() == 1)
    block = nss.optim.row_gradients(model, [{"params": [vector]}])
    rows = block.__enter__()
    return Way(model, nss.optim.MaskedAdamW(rows.groups(), lr=1e-4), block)


def adapted(config: Callable[[int], peft.PeftConfig]) -> Callable[[Workload, nss.Slice], Way]:
    """A way that trains PEFT's adapters, of the rank whose size is nearest the tuned rows'."""

    def build(workload: Workload, tuned: nss.Slice) -> Way:
        def with_rank(rank: int) -> nn.Module:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return peft.get_peft_model(workload.model(), config(rank))

        size = trained(with_rank(1))
        model = training(with_rank(max(1, round(tuned_parameters(workload, tuned) / size))))
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
        return Way(model.get_base_model(), optimizer, nullcontext())

    return build


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def tuned_parameters(workload: Workload, tuned: nss.Slice) -> int:
    model = workload.model()
    with nss.optim.row_gradients(model, tuned.parameters(model)) as rows:
        return sum(leaf.numel() for leaf in rows.parameters())


def ways(workload: Workload) -> dict[str, Callable[[Workload, nss.Slice], Way]]:
    lora = adapted(lambda r: peft.LoraConfig(r=r, target_modules=workload.adapted))
    found = {"ours": ours, "least": least, "full": full, "hook": hooks, "lora": lora}
    if workload.adapted == LINEAR:
        found["shira"] = adapted(lambda r: peft.ShiraConfig(r=r, target_modules=LINEAR))
    return found


def check(workload: Workload, tuned: nss.Slice, inputs: Inputs, labels: Tensor) -> None:
    """Raises unless the first step's gradients are the rows of the whole ones."""
    model = training(workload.model())
    whole = copy.deepcopy(model)
    F.cross_entropy(logits_of(inputs.run(whole)), labels).backward()
    of = {id(p): q.grad for p, q in zip(model.parameters(), whole.parameters(), strict=True)}
    with nss.optim.row_gradients(model, tuned.parameters(model)) as rows:
        F.cross_entropy(logits_of(inputs.run(model)), labels).backward()
        for member in rows.tuned:
            expected = of[id(member.parameter)].index_select(member.neuron_dim, member.rows)
            scale = float(expected.abs().max())
            torch.testing.assert_close(
                member.leaf.grad, expected, rtol=1e-3, atol=1e-4 * scale + 1e-9
            )


def mebibytes(key: str) -> float:
    """Of this process, `VmRSS` now or `VmHWM` at most since it was reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) / 1024


def trimmed() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return mebibytes("VmRSS")


def peak(build: Callable[[], Way], inputs: Inputs, labels: Tensor) -> float:
    """How much memory a way takes, over two steps."""
    before = trimmed()
    Path("/proc/self/clear_refs").write_text("5")
    way = build()
    with way.block if isinstance(way.block, nullcontext) else ExitStack():
        for _ in range(2):
            way.step(inputs, labels)
    found = mebibytes("VmHWM") - before
    way.block.__exit__(None, None, None)
    return found


def measure(name: str, workload: Workload, share: float, rounds: int) -> Result:
    torch.manual_seed(0)
    inputs = workload.inputs()
    labels = torch.arange(workload.batch) % CLASSES
    model = workload.model()
    tuned = drawn(model, inputs, share)
    check(workload, tuned, inputs, labels)
    builds = ways(workload)
    peaks = {
        key: peak(lambda key=key: builds[key](workload, tuned), inputs, labels)
        for key in builds
        if key != "least"
    }
    made = {key: build(workload, tuned) for key, build in builds.items()}
    for way in made.values():
        way.step(inputs, labels)
    times: dict[str, list[float]] = {key: [] for key in made}
    for i in range(rounds):
        for key in list(made)[:: 1 if i % 2 else -1]:
            begin = time.perf_counter()
            made[key].step(inputs, labels)
            times[key].append(time.perf_counter() - begin)
    for way in made.values():
        way.block.__exit__(None, None, None)
    own = made["ours"]
    typical = statistics.median(times["ours"])
    share_tuned = tuned_parameters(workload, tuned) / sum(p.numel() for p in model.parameters())
    ratio = made["full"].state_bytes() / own.state_bytes()
    states = {key: made[key].state_bytes() / 2**20 for key in peaks}
    values: dict[str, Any] = {
        "tuned": Ratio(share_tuned, share_tuned, share_tuned),
        "ms": typical * 1e3,
        "rate": 1 / typical,
        "state": states.pop("ours"),
        "states": " / ".join(f"{size:,.2f}" for size in states.values()),
        "peak": peaks.pop("ours"),
        "peaks": " / ".join(f"{size:,.0f}" for size in peaks.values()),
        "memory": Ratio(ratio, ratio, ratio),
    }
    for key, of in times.items():
        if key != "ours":
            both = zip(of, times["ours"], strict=True)
            name_of = "limit" if key == "least" else f"vs_{key}"
            values[name_of] = Ratio.of([theirs / mine for theirs, mine in both])
    return Result(f"{name} {share:.0%}", values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small batches, few layers, 10 %")
    quick = parser.parse_args().quick
    logging.getLogger("peft").setLevel(logging.ERROR)
    console = Console(width=160)
    models = {
        "ResNet-20": resnet20(32 if quick else 128),
        "ViT-S": vit_small(2 if quick else 8, 2 if quick else 12),
        "BERT": bert_base(2 if quick else 8, 2 if quick else 12),
    }
    section = Section("readapt_step", "A step of re-adaptation", NOTE, COLUMNS, [])
    for name, workload in models.items():
        for share in (0.10,) if quick else SHARES:
            section.results.append(measure(name, workload, share, 3 if quick else 15))
            console.print(f"{section.results[-1].name}: done", style="dim")
            if not quick:
                section.write()
    section.show(console)
    print(section.summary())


if __name__ == "__main__":
    main()
