import importlib.util
from collections.abc import Generator, Iterator

import hypothesis
import pytest
import torch

# The same examples each run, and no deadline: a shared machine's pauses are not failures.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("suite")

# Tests compare with float64; convolutions of float32 round their factors to TF32 otherwise.
torch.backends.cudnn.allow_tf32 = False


def _devices() -> dict[str, str]:
    """The devices to test on, and for those left out the reason."""
    from neusemslice import _C

    devices = {"cpu": ""}
    if not torch.cuda.is_available():
        devices["cuda"] = "not tested: no CUDA device"
    elif _C.build_info()["cuda"] is None:
        devices["cuda"] = "not tested: the extension was built without CUDA"
    else:
        devices["cuda"] = ""
    return devices


DEVICES = _devices()


def pytest_report_header() -> list[str]:
    return [f"device {name}: {reason or 'tested'}" for name, reason in DEVICES.items()]


@pytest.fixture(params=[name for name, reason in DEVICES.items() if not reason])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that a test runs on; of a package's user the models, batches stay on the CPU."""
    return torch.device(request.param)


def _without_tracing(item: pytest.Item) -> Generator[None, object, object]:
    """Skips a test of what cannot be done here: GPU machines may lack torch-pruning."""
    try:
        return (yield)
    except ImportError as error:
        if importlib.util.find_spec("torch_pruning") is None and "torch-pruning" in str(error):
            pytest.skip(str(error))
        raise


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_without_tracing)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(_without_tracing)


@pytest.fixture
def each_capability() -> Iterator[list[str]]:
    """Names of the instruction sets that work here; the one in use comes back afterwards."""
    from neusemslice import _C

    used = _C.build_info()["cpu_capability"]
    yield _C.cpu_capabilities()
    _C.set_cpu_capability(used)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
