from collections.abc import Iterator

import hypothesis
import pytest
import torch

# The same examples each run, and no deadline: a shared machine's pauses are not failures.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("suite")


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
    """Every device that a test of the operators runs on."""
    return torch.device(request.param)


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
