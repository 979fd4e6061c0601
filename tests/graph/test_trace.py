"""Sites, the tensors that neurons own, coupled groups, and what is refused or kept whole."""

import json

import pytest
import torch
from models import (
    IMAGES,
    Concatenated,
    Depthwise,
    Grouped,
    Laid,
    Mlp,
    PaddedShortcut,
    Residual,
    Reused,
)
from models import lenet as make_lenet
from torch import nn

from neusemslice.graph import Graph, Inputs, Span, fingerprint, trace

IMAGE = Inputs((torch.zeros(2, 1, 8, 8),))
VECTOR = Inputs((torch.zeros(2, 12),))


def group_of(graph: Graph, name: str) -> tuple[tuple[str, ...], str]:
    group = graph.groups[graph.site(name).group]
    return group.sites, group.kept_whole


class TestSites:
    def test_each_hidden_layer_is_a_site_read_at_the_next(self):
        graph = trace(Mlp(), VECTOR)
        assert [(s.name, s.neurons, s.readers[0].module) for s in graph.sites] == [
            ("first", 16, "second"),
            ("second", 16, "head"),
        ]
        assert graph.outputs == ("head",)
        assert graph.num_outputs == 4

    def test_a_neuron_owns_rows_bias_norm_and_its_readers_columns(self):
        graph = trace(make_lenet(), IMAGE)
        site = graph.site("3")
        assert set(site.rows) == {
            Span("3.weight", 0),
            Span("3.bias", 0),
            Span("4.weight", 0),
            Span("4.bias", 0),
            Span("4.running_mean", 0),
            Span("4.running_var", 0),
        }
        assert site.columns == (Span("7.weight", 1, start=0, repeat=16),)
        assert site.readers[0].repeat == 16

    def test_a_branch_and_its_projection_are_one_site(self):
        graph = trace(Residual(), IMAGE)
        assert graph.site("conv2").producers == ("conv2", "project")
        assert [r.module for r in graph.site("stem").readers] == ["conv1", "project"]

    def test_each_part_of_a_concatenation_has_its_range(self):
        graph = trace(Concatenated(), IMAGE)
        right = graph.site("right")
        assert (right.readers[0].module, right.readers[0].start) == ("join", 4)
        assert Span("norm.weight", 0, start=4) in right.rows
        assert [r.module for r in graph.site("left").readers] == ["right", "join"]

    def test_span_indices(self):
        neurons = torch.tensor([0, 2])
        assert Span("w", 1, start=3, repeat=2).indices(neurons).tolist() == [3, 4, 7, 8]


class TestGroups:
    def test_a_residual_stream_is_coupled(self):
        graph = trace(Residual(), IMAGE)
        assert group_of(graph, "outer") == (("conv2", "outer"), "")
        assert group_of(graph, "inner") == (("inner",), "")
        assert group_of(graph, "stem") == (("stem",), "")

    def test_a_depthwise_convolution_is_coupled_to_its_input(self):
        graph = trace(Depthwise(), IMAGE)
        assert group_of(graph, "expand") == (("expand", "depthwise"), "")

    def test_a_padded_shortcut_is_kept_whole(self):
        graph = trace(PaddedShortcut(), IMAGE)
        sites, reason = group_of(graph, "stem")
        assert sites == ("stem", "conv2")
        assert reason
        assert group_of(graph, "conv1") == (("conv1",), "")

    def test_grouped_convolutions_and_mixing_norms_are_kept_whole(self):
        graph = trace(Grouped(), IMAGE)
        assert "grouped is a grouped convolution" in group_of(graph, "first")[1]
        assert "norm (GroupNorm) mixes" in group_of(graph, "third")[1]

    def test_a_layer_called_twice_is_not_a_site(self):
        graph = trace(Reused(), VECTOR)
        assert [s.name for s in graph.sites] == ["last"]
        assert "used more than once" in graph.skipped["twice"]


class TestRows:
    """A reader's first dimension: samples, pieces of samples, or something else."""

    def traced(self, kind, samples=3):
        return trace(Laid(kind), Inputs((torch.randn(samples, 5, 12),)))

    def test_samples_in_pieces(self):
        graph = self.traced("in order")
        assert graph.site("first").readers[0].pieces
        assert not graph.site("second").readers[0].pieces

    @pytest.mark.parametrize(("kind", "samples"), [("interleaved", 3), ("in order", 1)])
    def test_pieces_that_cannot_be_assigned(self, kind, samples):
        graph = self.traced(kind, samples)
        rows = 5 * samples
        assert graph.skipped["first"] == (
            f"second reads {rows} rows that are not samples or parts of them"
        )
        assert [site.name for site in graph.sites] == ["second"]

    def test_constants(self):
        skipped = self.traced("constant").skipped
        assert skipped["place"] == "size reads 7 rows that are not samples or parts of them"


class TestLayers:
    def test_multiply_adds(self):
        macs = {layer.name: layer.macs for layer in trace(make_lenet(), IMAGE).layers}
        assert macs == {"0": 36 * 64, "3": 4 * 6 * 9 * 16, "7": 96 * 10, "9": 40}

    def test_depthwise_and_transposed(self):
        model = nn.Sequential(
            nn.Conv2d(1, 4, 1),
            nn.ConvTranspose2d(4, 3, 2, stride=2),
            nn.Flatten(),
            nn.Linear(768, 2),
        )
        graph = trace(model, IMAGE)
        macs = {layer.name: layer.macs for layer in graph.layers}
        assert macs["1"] == 4 * 3 * 4 * 64  # each input pixel meets the whole kernel
        assert graph.site("1").rows[0] == Span("1.weight", 1)
        assert graph.site("0").columns == (Span("1.weight", 0),)
        assert next(x.macs for x in trace(Depthwise(), IMAGE).layers if x.depthwise) == 8 * 9 * 64


class TestOddLayers:
    def test_a_layer_that_returns_no_tensor(self):
        class Pair(nn.Linear):
            def forward(self, x):
                return super().forward(x), None

        class Model(Mlp):
            def __init__(self):
                super().__init__()
                self.first = Pair(12, 16)

            def forward(self, x):
                return self.head(self.second(self.first(x)[0]).relu())

        model = Model()
        graph = trace(model, VECTOR)
        assert "first" not in {layer.name for layer in graph.layers}
        assert not any(m._forward_hooks for m in model.modules())


class TestModelIsLeftAlone:
    @pytest.mark.parametrize("name", IMAGES)
    def test_modes_flags_and_tensors(self, name):
        model = IMAGES[name]().train()
        modules = list(model.modules())
        modules[-1].eval()
        next(model.parameters()).requires_grad_(False)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        flags = [p.requires_grad for p in model.parameters()]
        trace(model, IMAGE)
        assert [m.training for m in modules[:-1]] == [True] * (len(modules) - 1)
        assert not modules[-1].training
        assert [p.requires_grad for p in model.parameters()] == flags
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)

    def test_works_under_no_grad(self):
        with torch.no_grad():
            assert len(trace(Mlp(), VECTOR).sites) == 2


class TestJson:
    @pytest.mark.parametrize("name", IMAGES)
    def test_round_trip(self, name):
        graph = trace(IMAGES[name](), IMAGE)
        assert Graph.from_json(json.loads(json.dumps(graph.to_json()))) == graph


class TestFingerprint:
    def test_is_of_the_structure_not_the_weights(self):
        assert fingerprint(Mlp()) == fingerprint(Mlp())
        assert fingerprint(Mlp()) != fingerprint(Mlp(hidden=17))
        assert fingerprint(Mlp()) == fingerprint(Mlp().bfloat16())


class TestRefusals:
    def test_nothing_to_slice(self):
        with pytest.raises(ValueError, match="Linear has no convolution or linear layer whose"):
            trace(nn.Linear(12, 4), VECTOR)

    def test_no_logits(self):
        class NoLogits(Mlp):
            def forward(self, x):
                return {"answer": super().forward(x)}

        with pytest.raises(TypeError, match=r"must return logits .* got dict"):
            trace(NoLogits(), VECTOR)

    def test_unknown_site(self):
        with pytest.raises(KeyError, match="no site 'third'; the model has first, second"):
            trace(Mlp(), VECTOR).site("third")
