"""The package as a whole: its public names, its layers, its documentation."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import neusemslice as nss

PACKAGE = Path(nss.__file__).parent
ROOT = PACKAGE.parent
LAYERS = ["ops", "graph", "profiling", "slicing", "optim", "maintain", "report"]
OPS = [
    "bitset_pack",
    "bitset_similarity",
    "bitset_similarity_edges",
    "class_order",
    "class_stats_",
    "class_stats_merge_",
    "masked_adamw_",
    "masked_sgd_",
    "pairwise_similarity",
    "pairwise_similarity_edges",
]


def test_public_names():
    for name in (
        "profile",
        "slice",
        "faithfulness",
        "restructure",
        "readapt",
        "extend",
        "Slice",
        "Profile",
    ):
        assert name in nss.__all__
        assert inspect.getdoc(getattr(nss, name)), f"{name} has no docstring"
    assert {"MaskedSGD", "MaskedAdamW"} <= set(nss.optim.__all__)


def test_every_public_name_exists():
    for module in (nss, nss.ops, nss.optim):
        for name in module.__all__:
            assert hasattr(module, name)


@pytest.mark.parametrize("name", OPS)
def test_every_operator_has_wrapper_kernel_fake_and_documentation(name):
    assert hasattr(torch.ops.neusemslice, name)
    wrapper = getattr(nss.ops, name)
    assert "Raises:" in inspect.getdoc(wrapper)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"neusemslice::{name}", "CPU")
    assert has_kernel(f"neusemslice::{name}", "Meta")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_imports_from_its_right(layer):
    right = {*LAYERS[LAYERS.index(layer) + 1 :], "cli", "demo", "data", "task", "reference"}
    for path in (PACKAGE / layer).rglob("*.py"):
        for module in imports(path):
            part = module.removeprefix("neusemslice.").split(".")[0]
            assert not (module.startswith("neusemslice.") and part in right), (
                f"{path.relative_to(ROOT)} imports {module}"
            )


def test_the_operators_need_neither_torch_pruning_nor_plots():
    for path in [*(PACKAGE / "ops").rglob("*.py"), PACKAGE / "reference.py"]:
        assert not {m.split(".")[0] for m in imports(path)} & {
            "torch_pruning",
            "matplotlib",
            "scipy",
        }


def test_each_stem_has_its_grid_of_files():
    for stem in ("class_stats", "similarity", "masked_optim"):
        for path in (
            f"csrc/ops/{stem}.h",
            f"csrc/ops/{stem}.cpp",
            f"csrc/ops/cpu/{stem}_kernel.cpp",
            f"csrc/ops/cuda/{stem}_kernel.cu",
            f"neusemslice/ops/{stem}.py",
            f"tests/ops/test_{stem}.py",
        ):
            assert (ROOT / path).is_file(), path


def test_common_headers_are_free_of_torch():
    for path in (ROOT / "csrc" / "common").glob("*.h"):
        assert not re.search(r"#include <(torch|ATen|c10)", path.read_text()), path.name


def test_kernels_are_launched_through_the_one_helper():
    for path in (ROOT / "csrc").rglob("*.cu*"):
        if path.name != "launch.cuh":
            assert "<<<" not in path.read_text(), path.name


def headers_of(path: Path) -> set[Path]:
    """The project's headers that a source includes, and those that they include."""
    found: set[Path] = set()
    for name in re.findall(r'#include "(.+)"', path.read_text()):
        header = ROOT / "csrc" / name
        if header.is_file() and header not in found:
            found |= {header} | headers_of(header)
    return found


def test_every_kernel_is_launched_in_a_test_on_the_simulated_device():
    """By the test itself, or by the code that launches it on a GPU as well."""
    cuda = ROOT / "csrc" / "ops" / "cuda"
    kernels = {
        name
        for path in [*cuda.glob("*.cu"), *cuda.glob("*.cuh")]
        for name in re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", path.read_text())
    }
    tests = [*(ROOT / "tests" / "cpp").glob("*_device_test.cpp")]
    read = {*tests, *(header for test in tests for header in headers_of(test))}
    launched = {
        name for path in read for name in re.findall(r"launch\(\s*\"(\w+)\"", path.read_text())
    }
    assert len(kernels) > 15
    assert kernels <= launched, f"never run: {sorted(kernels - launched)}"


def test_the_readmes_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
