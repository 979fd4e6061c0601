"""What several test files need."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from neusemslice import _C

T = TypeVar("T")
_device = torch.device("cpu")


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Inside the block ``here`` is this device, and networks are built on it."""
    global _device
    before, _device = _device, device
    try:
        yield
    finally:
        _device = before


def current_device() -> torch.device:
    """The device that the test runs on: the CPU, unless it has the fixture ``device``."""
    return _device


def here(given: T) -> T:
    """A tensor or a module on the device that the test runs on; in a dict, each of them."""
    if isinstance(given, dict):
        return {name: here(value) for name, value in given.items()}
    # On a device whose tensors are a class of their own, parameters with several names stay one.
    swap = torch.__future__.set_swap_module_params_on_conversion
    before = torch.__future__.get_swap_module_params_on_conversion()
    swap(_device.type not in ("cpu", "cuda"))
    try:
        return given.to(_device)
    finally:
        swap(before)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Runs a block with `count` threads inside operators."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each_capability() -> Iterator[str]:
    """Makes the CPU kernels use each instruction set that works here in turn."""
    used = _C.build_info()["cpu_capability"]
    try:
        for name in _C.cpu_capabilities():
            _C.set_cpu_capability(name)
            yield name
    finally:
        _C.set_cpu_capability(used)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and value, with NaN equal to NaN."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))
        and torch.equal(a.isnan(), b.isnan())
    )


def layouts(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """One random matrix or batch in the layouts that operators meet."""
    x = torch.randn(*shape, dtype=torch.float64, device=device).to(dtype)
    wide = torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64, device=device).to(dtype)
    return {
        "contiguous": x,
        "sliced": wide[..., ::2],
        "permuted": x.transpose(0, -1).contiguous().transpose(0, -1),
        "expanded": x[:1].expand(shape),
        "requires_grad": x.clone().requires_grad_(),
    }


def cuda_implementation(name: str, *arguments: Any) -> Any:
    """What an operator that on CUDA is made of torch's own does, on the CPU's tensors as well."""
    op = getattr(torch.ops.neusemslice, name).default
    return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


def quick(*benchmark: str) -> dict[str, Any]:
    """What a benchmark, named as ``python -m`` takes it, says in its last line with ``--quick``."""
    result = subprocess.run(
        [sys.executable, "-m", *benchmark, "--quick"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
