"""Restructured models are plain modules: exporters take them as they are."""

import copy

import pytest
import torch
from helpers import here
from restructured import case
from torch import nn
from torch.export import Dim

from neusemslice.graph import Inputs, logits_of

pytestmark = pytest.mark.usefixtures("device")


def ready(name: str) -> tuple[nn.Module, Inputs]:
    """The restructured model and inputs; a model of texts returns no cache, as export asks for."""
    made = case(name)
    model = copy.deepcopy(made.small.model)
    if hasattr(model, "config"):
        model.config.use_cache = False
    return model, made.inputs


def answer(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(inputs.run(model))


@pytest.mark.parametrize("name", ["residual", "depthwise", "concatenated", "vit", "bert", "llama"])
def test_torch_export(name):
    model, inputs = ready(name)
    program = torch.export.export(model, inputs.args, dict(inputs.kwargs))
    torch.testing.assert_close(answer(program.module(), inputs), answer(model, inputs))


def test_torch_export_of_any_batch_size():
    model, inputs = ready("residual")
    program = torch.export.export(model, inputs.args, dynamic_shapes=({0: Dim("batch")},))
    more = Inputs((here(torch.randn(13, 1, 8, 8)),))
    torch.testing.assert_close(answer(program.module(), more), answer(model, more))


@pytest.mark.parametrize("name", ["lenet", "residual", "depthwise", "vit", "bert", "llama"])
def test_onnx(name):
    for module in ("onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    import onnxruntime

    model, inputs = ready(name)
    program = torch.onnx.export(
        model, inputs.args, kwargs=dict(inputs.kwargs), dynamo=True, verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    given = [*inputs.args, *inputs.kwargs.values()]
    names = [entry.name for entry in session.get_inputs()]
    found = session.run(None, {n: t.cpu().numpy() for n, t in zip(names, given, strict=True)})
    torch.testing.assert_close(
        torch.from_numpy(found[0]), answer(model, inputs).cpu(), rtol=1e-4, atol=1e-4
    )
