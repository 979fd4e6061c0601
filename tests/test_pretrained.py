"""Restructured models of transformers go through the library's own files, or are refused."""

import json

import pytest
import torch
import transformer_models
from helpers import here
from restructured import case

import neusemslice as nss
from neusemslice import Slice
from neusemslice.graph import logits_of

pytestmark = pytest.mark.usefixtures("device")


def made(name, whole=(), **options):
    """A model restructured at equal shares, apart from the sites whose names hold some text."""
    model = transformer_models.transformer(name)
    batches = transformer_models.batches(name, 8)
    slicing = nss.slice(nss.profile(model, batches), threshold=0.9)
    small = nss.restructure(model, slicing, calibration=batches, **options)
    masks = {
        site: torch.ones_like(mask) if any(text in site for text in whole) else mask
        for site, mask in small.kept.masks().items()
    }
    kept = Slice(small.kept.graph, masks)
    return nss.restructure(model, kept, calibration=batches)


def answer(model, name):
    with torch.no_grad():
        return logits_of(model.eval()(**here(transformer_models.batch(name, 4, seed=99))))


@pytest.mark.parametrize(
    ("name", "whole", "changed"),
    [
        ("llama", (), {"intermediate_size": 12, "num_key_value_heads": 1, "head_dim": 4}),
        ("qwen2", (), {"intermediate_size": 12, "num_attention_heads": 2}),
        ("qwen3", (), {"intermediate_size": 12, "num_attention_heads": 2, "head_dim": 8}),
        ("vit", (), {"intermediate_size": 12, "num_attention_heads": 2, "head_dim": 4}),
        ("mixtral", (), {"num_local_experts": 2, "num_key_value_heads": 1}),
        ("gpt2", ("attn",), {"n_inner": 32, "n_head": 4}),
        ("bert", ("attention", "pooler"), {"intermediate_size": 12, "num_attention_heads": 4}),
    ],
)
def test_from_pretrained_gives_the_same_bits(tmp_path, name, whole, changed):
    small = made(name, whole, keep=0.5)
    before = small.model.config.to_dict()
    folder = small.save_pretrained(tmp_path / "saved")
    assert small.model.config.to_dict() == before
    config = json.loads((folder / "config.json").read_text())
    assert changed.items() <= config.items()
    found = here(type(small.model).from_pretrained(folder))
    assert torch.equal(answer(found, name), answer(small.model, name))
    tensors = small.model.state_dict()
    assert found.state_dict().keys() == tensors.keys()
    for key, value in found.state_dict().items():
        assert torch.equal(value, tensors[key]), key


class TestRefusals:
    def refused(self, small, tmp_path, message, error=ValueError):
        with pytest.raises(error, match=message):
            small.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    def test_unequal_layers(self, tmp_path):
        small = made("llama", keep=0.5)
        masks = small.kept.masks()
        masks["model.layers.1.mlp.gate_proj"][:13] = True
        unequal = nss.restructure(
            transformer_models.transformer("llama"),
            Slice(small.kept.graph, masks),
            calibration=transformer_models.batches("llama", 8),
        )
        self.refused(
            unequal,
            tmp_path,
            r"intermediate_size is one number for all layers, .* unequal: "
            r"model\.layers\.0\.mlp\.gate_proj 12, model\.layers\.1\.mlp\.gate_proj \d+; "
            r"restructure with keep=",
        )

    def test_heads_that_the_library_cannot_build(self, tmp_path):
        self.refused(
            made("bert", ("pooler",), keep=0.5),
            tmp_path,
            r"BertForSequenceClassification has no configuration for these sizes: "
            r"bert\.encoder\.layer\.0\.attention\.self\.query\.weight is \[8, 16\], the library "
            r"would build \[16, 16\]; keep those neurons whole",
        )

    def test_one_layer_only(self, tmp_path):
        self.refused(
            made("vit", ("layers.0",), keep=0.5),
            tmp_path,
            r"no configuration for these sizes: vit\.layers\.0\.\S+ is",
        )

    def test_what_no_number_counts(self, tmp_path):
        self.refused(
            made("bert", ("attention",), keep=0.5),
            tmp_path,
            r"counts the neurons of site bert\.pooler\.dense, of which 8 of 16 are left",
        )

    def test_another_library(self, tmp_path):
        self.refused(
            case("lenet").small, tmp_path, "needs a model of transformers, got Seq", TypeError
        )
