"""contribution_ against memory and torch, and a Taylor sweep against Captum and a hook loop.

python -m bench.contribution            all, writes bench/results/
python -m bench.contribution --quick    small batches, few rounds, nothing written

The last line is one JSON object. Per kernel workload: the share of the physical limit, and how many
times longer torch's operators take. Per sweep: `overhead`, the added share of one forward pass and
one backward pass that finds no weight gradients; `vs_captum`, how many times longer Captum takes,
called once per layer and class on the class's samples; `vs_hooks`, how many times longer a loop
takes whose hooks keep activations and multiply them with their gradients in Python. The sweeps need
Captum and torch-pruning, and are left out where one of them is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch
from rich.console import Console
from torch import Tensor

from bench import harness, sweeps
from bench.device import ON_GPU, use_device
from bench.harness import Workload
from bench.report import Section, missing
from neusemslice import ops, reference
from neusemslice.ops import CONTRIBUTION_STATISTICS, ClassStats

TITLE = "Contributions of every site and class"
# Of the state per class and neuron: mean in float64, mean_abs in float32.
STATE_BYTES = 12
NOTE = (
    "Mean and mean |·| of x · g; state 12 bytes per class and neuron. “of limit”: the time in "
    "which memory moves the same bytes, over ours. torch's operators add in float32; strongest: "
    "into buffers that are there already."
)


def kernel_workload(name: str, shape: tuple[int, ...], num_classes: int) -> Workload:
    size = 4 * torch.Size(shape).numel()
    pairs = [torch.randn(2, *shape) for _ in range(harness.rotation(2 * size))]
    labels = [torch.randint(0, num_classes, shape[:1]) for _ in pairs]
    orders = [ops.class_order(y, num_classes) for y in labels]
    samples, neurons = shape[:2]

    def empty() -> ClassStats:
        return ClassStats.empty(num_classes, neurons, CONTRIBUTION_STATISTICS)

    state = empty()
    totals = torch.zeros(2, num_classes, neurons)
    product, row = torch.empty(shape), torch.empty(samples, neurons)

    def ours(call: int) -> None:
        i = call % len(pairs)
        ops.contribution_(state, *pairs[i], orders[i])

    def add(q: Tensor, absolute: Tensor, i: int) -> None:
        totals[0].index_add_(0, labels[i], q)
        totals[1].index_add_(0, labels[i], absolute)

    def plain(call: int) -> None:
        x, g = pairs[i := call % len(pairs)]
        q = (x * g).flatten(2).mean(2) if x.ndim > 2 else x * g
        add(q, q.abs(), i)

    def preallocated(call: int) -> None:
        x, g = pairs[i := call % len(pairs)]
        torch.mul(x, g, out=product)
        q = product
        if x.ndim > 2:
            q = torch.mean(product.flatten(2), 2, out=row)
        add(q, q.abs(), i)

    def contracted(call: int) -> None:
        """The product is never written: each plane is a dot product."""
        x, g = pairs[i := call % len(pairs)]
        parts = (x.reshape(-1, 1, x[0, 0].numel()), g.reshape(-1, g[0, 0].numel(), 1))
        q = torch.bmm(*parts).view(samples, neurons) / x[0, 0].numel()
        add(q, q.abs(), i)

    strongest = {"preallocated": preallocated}
    if len(shape) > 2:
        strongest["dot products"] = contracted

    def check() -> None:
        states = [empty() for _ in range(2)]
        for fresh in states:
            ops.contribution_(fresh, *pairs[0], orders[0])
        harness.same_bits(states[0].tensors(), states[1].tensors())
        some = slice(0, 32)  # the oracle goes through neurons and samples one by one
        x, g = (t[:, some].cpu() for t in pairs[0])
        with torch.device("cpu"):
            expected = reference.contribution(x, g, labels[0].cpu(), num_classes)
        assert states[0].mean is not None
        assert expected.mean is not None
        found = states[0].mean[:, some].cpu()
        torch.testing.assert_close(found, expected.mean, rtol=1e-9, atol=1e-12)
        for run in (plain, *strongest.values()):
            totals.zero_()
            run(0)
            found = totals[0].cpu().double() / expected.count.clamp_min(1).unsqueeze(1)
            torch.testing.assert_close(found[:, some], expected.mean, rtol=1e-3, atol=1e-4)

    present = statistics.mean(y.unique().numel() for y in labels)
    return Workload(
        name,
        2 * size + 8 * samples,
        int(present * neurons * STATE_BYTES),
        ours,
        check,
        {"strongest": dict(strongest), "plain": {"plain": plain}},
    )


KERNELS = {
    "fp32 [4096, 2048] K=10": ((4096, 2048), 10),
    "fp32 [4096, 2048] K=100": ((4096, 2048), 100),
    "fp32 conv [256, 512, 14, 14] K=10": ((256, 512, 14, 14), 10),
}


KERNELS_ON_GPU = {
    "fp32 [65536, 2048] K=10": ((65536, 2048), 10),
    "fp32 [65536, 2048] K=100": ((65536, 2048), 100),
    "fp32 conv [512, 512, 14, 14] K=10": ((512, 512, 14, 14), 10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds")
    quick = parser.parse_args().quick
    patience = 0.5 if quick else 5.0
    use_device()
    console = Console(width=160)
    kernels = Section("contribution", "Contributions of one site", NOTE, harness.COLUMNS, [])
    for name, (shape, num_classes) in (KERNELS_ON_GPU if ON_GPU else KERNELS).items():
        torch.manual_seed(0)
        workload = kernel_workload(name, shape, num_classes)
        kernels.results.append(harness.measure(workload, 3 if quick else 15, patience))
        console.print(f"{name}: done", style="dim")
    sections = [kernels]
    if absent := missing("captum", "torch_pruning"):
        console.print(f"the sweeps are left out: {absent}")
    else:
        sections.append(whole := Section("sweep", TITLE, sweeps.NOTE, sweeps.COLUMNS, []))
        for name, case in sweeps.CASES.items():
            if quick and not case.quick:
                continue
            whole.results.append(sweeps.measure(name, case, quick, patience))
            console.print(f"{name}: done", style="dim")
    summary = {}
    for section in sections:
        section.show(console)
        if not quick:
            console.print(f"written: {section.write().name}")
        summary.update(json.loads(section.summary()))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
