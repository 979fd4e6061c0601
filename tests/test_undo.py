"""The way back from a restructured model: to the parent bit for bit, or a part of the way."""

import copy
import dataclasses

import pytest
import torch
from helpers import here
from models import Mlp
from restructured import NETWORKS, build, case
from test_restructure import TOLERANCE

import neusemslice as nss
from neusemslice import Slice
from neusemslice.graph import cut, fingerprint, logits_of
from neusemslice.maintain import Restructured, Undo, finetune, regrow

pytestmark = pytest.mark.usefixtures("device")


def trained(made):
    """A copy of the small model, trained for an epoch."""
    small = copy.deepcopy(made.small.model)
    finetune(small, made.batches, epochs=1)
    return small


def assert_same(found, model):
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, value in found.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("name", NETWORKS)
def test_the_parent_comes_back_bit_for_bit(tmp_path, name):
    """After compensation, and after fine-tuning too; through a file; and it answers as it did."""
    made = case(name)
    for small in (made.small.model, trained(made)):
        before = copy.deepcopy(small.state_dict())
        path = Undo.between(made.model, small, made.small.kept).save(tmp_path / "undo")
        parent = Undo.load(path).parent(small)
        assert_same(parent, made.model)
        assert repr(parent) == repr(made.model)
        with torch.no_grad():
            answers = [logits_of(made.inputs.run(m)) for m in (parent, made.model)]
        assert torch.equal(*answers)
        for key, value in small.state_dict().items():
            assert torch.equal(value, before[key])


@pytest.mark.pretended
def test_on_each_device(tmp_path, device):
    """Saved, loaded, undone and regrown where the model is; batches stay where they were."""
    made = case("residual")
    model = build("residual")
    small = nss.restructure(model, made.small.kept, calibration=made.batches)
    undo = Undo.between(model, small.model, small.kept)
    again = Restructured.load(small.save(tmp_path / "model"), build("residual"))
    assert_same(again.model, small.model)
    assert_same(undo.parent(again.model), model)
    whole = Slice.whole(small.kept.graph)
    grown = regrow(again, undo, whole, calibration=made.batches, compensate=False)
    assert grown.model.head.weight.device.type == device.type


def test_its_size_is_that_of_what_was_removed_and_changed(tmp_path):
    made = case("lenet", compensate=False)
    undo = Undo.between(made.model, made.small.model, made.small.kept)
    count = [
        sum(t.numel() for t in m.state_dict().values()) for m in (made.model, made.small.model)
    ]
    assert undo.nbytes == 4 * (count[0] - count[1])
    with torch.no_grad():
        changed = copy.deepcopy(made.small.model)
        changed[7].weight[1] += 1
    more = Undo.between(made.model, changed, made.small.kept)
    assert more.nbytes == undo.nbytes + changed[7].weight[1].nbytes + 8
    whole = Slice.whole(made.small.kept.graph)
    assert Undo.between(made.model, copy.deepcopy(made.model), whole).nbytes == 0


class TestRegrow:
    @pytest.mark.parametrize("name", ["lenet", "residual", "depthwise", "concatenated", "llama"])
    def test_given_neurons_come_back_and_all_else_stays(self, name):
        """Every element is the parent's if a regrown neuron has part in it, else as it is now."""
        made = case(name)
        small = dataclasses.replace(made.small, model=trained(made))
        undo = Undo.between(made.model, small.model, small.kept)
        site = next(s for s, (old, new) in small.report.widths.items() if new < old)
        gone = (~small.kept.mask(site)).nonzero().squeeze(1)
        some = Slice(
            small.kept.graph,
            {site: torch.zeros(small.kept.graph.site(site).neurons).index_fill(0, gone[:1], 1) > 0},
        )
        found = regrow(small, undo, some, calibration=made.batches, compensate=False)
        assert found.kept == (small.kept | some).closed()
        assert found.report.widths[site][1] == small.report.widths[site][1] + 1
        assert found.report.difference <= TOLERANCE
        assert found.report.after.parameters > small.report.after.parameters
        graph = small.kept.graph
        # Cut again to what the small model has, it is the small model.
        whole = undo.whole(small.model)
        assert_same(cut(whole, graph, small.kept.masks()), small.model)
        assert_same(cut(whole, graph, found.kept.masks()), found.model)
        # And where the small model has nothing it is the parent.
        ones = copy.deepcopy(made.small.model)
        with torch.no_grad():
            for tensor in ones.state_dict().values():
                tensor.fill_(1)
        marked = undo.whole(ones).state_dict()
        for key, value in whole.state_dict().items():
            differs = value != made.model.state_dict()[key]
            assert bool((marked[key][differs] == 1).all()), key

    def test_compensated_it_is_nearer_to_the_parent(self):
        made = case("residual")
        undo = Undo.between(made.model, made.small.model, made.small.kept)
        half = {
            name: mask | (torch.arange(len(mask)) % 2 == 0)
            for name, mask in made.small.kept.masks().items()
        }
        more = Slice(made.small.kept.graph, half)
        found = {
            fit: regrow(made.small, undo, more, calibration=made.batches, compensate=fit)
            for fit in (False, True)
        }
        x = here(torch.cat([x for x, _ in made.batches]))
        with torch.no_grad():
            off = {
                name: float((model(x) - made.model(x)).square().mean())
                for name, model in (
                    ("small", made.small.model),
                    *((fit, small.model) for fit, small in found.items()),
                )
            }
        assert off[True] < off["small"]
        assert off[True] < off[False]
        assert found[True].report.refits
        assert not found[False].report.refits

    def test_all_neurons_of_an_untouched_model_give_the_parent(self, tmp_path):
        made = case("residual", compensate=False)
        undo = Undo.between(made.model, made.small.model, made.small.kept)
        whole = Slice.whole(made.small.kept.graph)
        found = regrow(made.small, undo, whole, calibration=made.batches)
        assert_same(found.model, made.model)
        # What was regrown is restructured like any other, and may be saved and undone.
        loaded = Restructured.load(found.save(tmp_path / "model"), build("residual"))
        assert_same(
            Undo.between(made.model, loaded.model, loaded.kept).parent(loaded.model), made.model
        )


class TestRefusals:
    def made(self):
        made = case("lenet")
        return made, Undo.between(made.model, made.small.model, made.small.kept)

    def test_a_model_that_was_trained_since(self):
        made, undo = self.made()
        message = "not the model that the undo was made for, or it was trained since: .* rows of"
        with pytest.raises(ValueError, match=message):
            undo.parent(trained(made))
        small = dataclasses.replace(made.small, model=trained(made))
        with pytest.raises(ValueError, match=message):
            regrow(small, undo, small.kept, calibration=made.batches)

    def test_an_undo_of_other_neurons(self):
        """As many of them, so that all sizes fit."""
        made, undo = self.made()
        graph = made.small.kept.graph
        turned = {name: mask.flip(0) for name, mask in made.small.kept.masks().items()}
        other = nss.restructure(
            made.model, Slice(graph, turned), calibration=made.batches, compensate=False
        )
        assert fingerprint(other.model) == fingerprint(made.small.model)
        with pytest.raises(ValueError, match="regrow: the undo must be of what the model holds"):
            regrow(other, undo, made.small.kept, calibration=made.batches, compensate=False)

    def test_a_change_where_compensation_changed_nothing(self):
        made, undo = self.made()
        small = copy.deepcopy(made.small.model)
        unchanged = set(small.state_dict()) - set(undo._changed.rows)
        name = next(n for n, _ in small.named_parameters() if n in unchanged)
        with torch.no_grad():
            small.get_parameter(name).flatten()[0] += 1
        with pytest.raises(ValueError, match="was changed since the undo was made, or the undo is"):
            undo.parent(small)

    @pytest.mark.parametrize("other", [Mlp, lambda: build("lenet")])
    def test_another_model(self, other):
        made, undo = self.made()
        with pytest.raises(ValueError, match="belongs to another model: it was made for structure"):
            undo.whole(other())
        with pytest.raises(ValueError, match="not the model that the undo was made for"):
            undo.parent(other())
        with pytest.raises(ValueError, match="belongs to another model"):
            Undo.between(Mlp(), made.small.model, made.small.kept)

    def test_what_is_not_left_of_the_parent(self):
        made, _ = self.made()
        with pytest.raises(ValueError, match="the models must be of one structure"):
            Undo.between(made.model, made.model, made.small.kept)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda undo: undo._removed.popitem(), "has no torch.float32 elements of"),
            (
                lambda undo: undo._removed.update({"0.bias": torch.zeros(7)}),
                r"is damaged in its elements of 0\.bias",
            ),
            (lambda undo: undo._removed["0.bias"].add_(1), "or the undo is damaged"),
        ],
    )
    def test_a_damaged_undo(self, tmp_path, change, message):
        made, undo = self.made()
        change(undo)
        found = Undo.load(undo.save(tmp_path / "undo"))
        with pytest.raises(ValueError, match=message):
            found.parent(made.small.model)

    def test_another_kind_of_file(self, tmp_path):
        made, _ = self.made()
        path = made.small.save(tmp_path / "file")
        with pytest.raises(ValueError, match="file holds a restructured model, expected a undo"):
            Undo.load(path)
