"""The package, its operators, their tests and their benchmarks without the optional packages."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu

ROOT = Path(__file__).parent.parent
MISSING = (
    "accelerate",
    "captum",
    "faiss",
    "lightning",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "peft",
    "plotly",
    "pyarrow",
    "pytorch_lightning",
    "sklearn",
    "torch_pruning",
    "torchvision",
    "transformers",
)
BLOCKED = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests" / "ops")!r}]
"""


def run_without(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_everything_that_a_gpu_machine_runs_is_imported():
    # Studies of training are made on other machines, against packages that must be there.
    studies = ("compression", "importances", "readapt", "readapt_step", "restructure", "tuning")
    benchmarks = [
        f"bench.{path.stem}" for path in (ROOT / "bench").glob("*.py") if path.stem not in studies
    ]
    tests = [path.stem for path in (ROOT / "tests" / "ops").glob("test_*.py")]
    tests += [Path(path).stem for path in gpu.TESTS if path.endswith(".py")]
    modules = ["neusemslice", *sorted(benchmarks), *sorted(tests), "conftest"]
    found = run_without(f"for name in {modules!r}: importlib.import_module(name)")
    assert found.returncode == 0, found.stderr


def test_every_test_module_is_collected():
    """What needs a package that is missing is skipped and says so."""
    found = run_without(
        """
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider"]))
"""
    )
    assert found.returncode == 0, found.stdout


CHECKS = {
    "class_stats": "b.workload(b.Case('x', (4096, 512), 3), with_compile=False).check()",
    "contribution": "b.kernel_workload('x', (2048, 512), 3).check()",
    "rows": "b.measure('x', b.Layer(4, 8, 8, 6, 2), 0.5, rounds=1, patience=0)",
    "similarity": "b.row_case(300, 8, 3, with_faiss=True, rounds=1).check(); print(b.note())",
    "profiler": "b.main()",
}


@pytest.mark.parametrize("stem", CHECKS)
def test_benchmarks_leave_out_the_peers_that_are_missing(stem):
    code = f"""
import bench.{stem} as b
sys.argv[1:] = ["--quick"]
{CHECKS[stem]}
"""
    found = run_without(code)
    assert found.returncode == 0, found.stderr
    if stem == "profiler":
        assert "ResNet-50 is left out: no transformers and no torch_pruning" in found.stdout


def test_tracing_says_what_is_missing():
    code = """
import torch, neusemslice as nss
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
nss.Profiler(model, torch.randn(2, 4))
"""
    found = run_without(code)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == (
        "ImportError: tracing a model needs torch-pruning, which is not installed: "
        "No module named 'torch_pruning'"
    )
