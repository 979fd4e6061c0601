"""On a GPU: operators run on the current stream and device, in graphs, and wait for nothing."""

import pytest
import torch
from conftest import DEVICES

from bench.each_op import CLASSES, calls
from neusemslice import ops, reference
from neusemslice.ops import ClassStats

pytestmark = pytest.mark.skipif(bool(DEVICES["cuda"]), reason=DEVICES["cuda"])
ALL = calls()
NOT_WAITING = [call for call in ALL if not call.waits]
GPU = torch.device("cuda", 0)


def names(made):
    return [call.name for call in made]


def warmed_up(call):
    """The call after one of its like has made what libraries make on their first use."""
    call.prepare(GPU)()
    torch.cuda.synchronize()
    return call.prepare(GPU)


@pytest.mark.parametrize("call", NOT_WAITING, ids=names(NOT_WAITING))
def test_nothing_waits_for_the_device(call):
    run = warmed_up(call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("call", NOT_WAITING, ids=names(NOT_WAITING))
def test_a_captured_graph_gives_the_bits_of_calls(call):
    run = call.prepare(GPU)
    run()
    expected = [t.clone() for t in run()]
    captured = warmed_up(call)
    graph = torch.cuda.CUDAGraph()
    # A launch on any other stream than the current one is an error while this is open.
    with torch.cuda.graph(graph):
        found = captured()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("call", ALL, ids=names(ALL))
def test_equals_the_cpu(call):
    on_gpu, on_cpu = call.prepare(GPU)(), call.prepare(torch.device("cpu"))()
    for a, b in zip(on_gpu, on_cpu, strict=True):
        if b.is_floating_point():
            half = b.dtype in (torch.float16, torch.bfloat16)
            rtol, atol = (1e-2, 1e-2) if half else (1e-5, 1e-5)
            torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=atol, equal_nan=True)
        elif a.shape == b.shape and "topk" not in call.name and "edges" not in call.name:
            # Of neighbours and edges, rounding decides between near equals.
            assert torch.equal(a.cpu(), b)


def test_work_follows_what_the_current_stream_has_still_to_do():
    x, late = torch.zeros(4000, 64, device=GPU), torch.randn(4000, 64).to(GPU)
    labels = torch.arange(4000) % CLASSES
    order = ops.class_order(labels.to(GPU), CLASSES)
    state = ClassStats.empty(CLASSES, 64, device=GPU)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles: tens of milliseconds
        x.copy_(late)
        ops.class_stats_(state, x, order)
    assert not side.query()
    side.synchronize()
    expected = reference.class_stats(late.cpu(), labels, CLASSES)
    torch.testing.assert_close(state.mean.cpu(), expected.mean, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("call", ALL, ids=names(ALL))
def test_any_device_index(call):
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        found = call.prepare(other)()
        assert torch.cuda.current_device() == 0
    for a, b in zip(found, call.prepare(GPU)(), strict=True):
        assert a.device == other
        assert torch.equal(a.cpu().nan_to_num(), b.cpu().nan_to_num())
