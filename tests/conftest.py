import importlib.util
from collections.abc import Generator, Iterator

import hypothesis
import pretended
import pytest
import torch
from helpers import on_device

# The same examples each run, and no deadline: a shared machine's pauses are not failures.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("suite")

# Tests compare with float64; convolutions of float32 round their factors to TF32 otherwise.
torch.backends.cudnn.allow_tf32 = False
# And what is trained twice is compared bit for bit.
torch.backends.cudnn.deterministic = True


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


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run the tests that are marked so on a pretended device, and no others"
    parser.addoption("--pretend", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("pretend"):
        pretended.pretended()


def pytest_report_header() -> list[str]:
    return [f"device {name}: {reason or 'tested'}" for name, reason in DEVICES.items()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        names = [name for name, reason in DEVICES.items() if not reason]
        if metafunc.config.getoption("pretend"):
            names = [pretended.NAME]
        metafunc.parametrize("device", names, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("pretend"):
        items[:] = [item for item in items if item.get_closest_marker("pretended")]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device that a test runs on.

    The tests' networks are built there (``helpers.here``); batches of loaders stay on the CPU, as
    those of users do.
    """
    place = torch.device(request.param)
    with on_device(place):
        yield place


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


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restructuring measures what it gives; no test is about how exactly."""
    from neusemslice.maintain import cost

    monkeypatch.setattr(cost, "SECONDS", 0.0)
