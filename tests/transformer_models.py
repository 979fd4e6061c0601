"""Small transformers with random weights, from transformers and written by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import here
from torch import Tensor, nn

TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_labels": 3,
}
LLAMA = TEXT | {"num_key_value_heads": 2}
IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 3,
}
GPT2 = {
    "vocab_size": 50,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
}
CONFIGS = {
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT),
    "gpt2": ("GPT2ForSequenceClassification", "GPT2Config", GPT2),
    "llama": ("LlamaForSequenceClassification", "LlamaConfig", LLAMA),
    "qwen2": ("Qwen2ForSequenceClassification", "Qwen2Config", LLAMA),
    "qwen3": (
        "Qwen3ForSequenceClassification",
        "Qwen3Config",
        LLAMA | {"head_dim": 8},
    ),
    "phi3": ("Phi3ForSequenceClassification", "Phi3Config", LLAMA),
    "mixtral": (
        "MixtralForSequenceClassification",
        "MixtralConfig",
        # The other implementations of experts do not know float64.
        LLAMA | {"num_local_experts": 4, "experts_implementation": "eager"},
    ),
}
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
OTHERS = {
    "mistral": (
        "MistralForSequenceClassification",
        "MistralConfig",
        LLAMA | {"head_dim": 4},
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", LLAMA),
    "bloom": (
        "BloomForSequenceClassification",
        "BloomConfig",
        {
            "vocab_size": 50,
            "hidden_size": 16,
            "n_layer": 2,
            "n_head": 4,
            "num_labels": 3,
            "pad_token_id": 0,
        },
    ),
    "gpt-neox": (
        "GPTNeoXForSequenceClassification",
        "GPTNeoXConfig",
        TEXT,
    ),
    "gpt-oss": (
        "GptOssForSequenceClassification",
        "GptOssConfig",
        LLAMA | EXPERTS | {"head_dim": 4, "num_local_experts": 4},
    ),
    "qwen3-moe": (
        "Qwen3MoeForSequenceClassification",
        "Qwen3MoeConfig",
        LLAMA | EXPERTS | {"head_dim": 4, "num_experts": 4, "moe_intermediate_size": 12},
    ),
}
"""Further texts' models, with something that those above have not."""
CONVNETS = {
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [2, 2],
            "layer_type": "basic",
            "num_labels": 3,
        },
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 12], "depths": [2, 2], "num_stages": 2, "num_labels": 3},
    ),
}
IMAGES = ("vit", "swin", *CONVNETS)


def library() -> Any:
    """transformers, without which the test is skipped."""
    return pytest.importorskip("transformers", reason="transformers is not installed")


def built(cls: str, config: str, settings: dict[str, Any], **options: Any) -> nn.Module:
    """A model of the library in evaluation mode, with biases and norms that are not trivial."""
    torch.manual_seed(0)
    model = getattr(library(), cls)(getattr(library(), config)(**settings, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return here(model.eval())


def convnet(name: str) -> nn.Module:
    """One of ``CONVNETS``."""
    return built(*CONVNETS[name])


def transformer(name: str, attention: str = "sdpa", **changes: Any) -> nn.Module:
    """One of the texts' or images' models."""
    cls, config, settings = (CONFIGS | OTHERS)[name]
    return built(cls, config, settings | changes, attn_implementation=attention)


def batch(name: str, samples: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of that model; texts are padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    if name in IMAGES:
        return {"pixel_values": torch.randn(samples, 3, 32, 32, generator=generator)}
    ids = torch.randint(3, 50, (samples, 7), generator=generator)
    lengths = torch.randint(2, 8, (samples, 1), generator=generator)
    mask = torch.arange(7) < lengths
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def batches(name: str, count: int = 3) -> list[dict[str, Tensor]]:
    """Labelled batches of three classes."""
    return [
        batch(name, 5, seed) | {"labels": (torch.arange(5) + seed) % 3} for seed in range(count)
    ]


class Attending(nn.Module):
    """One attention of 4 heads of 3 features over tokens [N, T, 10], then an MLP.

    `kind` says how queries, keys and values are made, or how heads are mixed.
    """

    def __init__(self, kind: str, heads: int = 4, groups: int = 2, size: int = 3) -> None:
        super().__init__()
        self.kind, self.heads, self.groups, self.size = kind, heads, groups, size
        width, shared = heads * size, groups * size
        fused = {"by head": 3 * width, "by group": width + 2 * shared, "blocks": width + 2 * shared}
        if kind in fused:
            self.fused = nn.Linear(10, fused[kind])
        else:
            self.queries = nn.Linear(10, width)
            self.pairs = nn.Linear(10, 2 * width)
            self.one = nn.Linear(10, width)
        if kind == "biased":
            self.bias = nn.Linear(1, heads)
        self.mixing = nn.Parameter(torch.rand(heads, heads))
        self.project = nn.Linear(width, 10)
        self.inner = nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [N, T, heads, size]."""
        n, t, _ = x.shape
        heads, groups, size = self.heads, self.groups, self.size
        if self.kind == "by head":
            q, k, v = self.fused(x).view(n, t, heads, 3, size).unbind(3)
        elif self.kind == "by group":
            share = heads // groups
            parts = self.fused(x).view(n, t, groups, share + 2, size)
            q = parts[:, :, :, :share].reshape(n, t, heads, size)
            k, v = (parts[:, :, :, i].repeat_interleave(share, 2) for i in (share, share + 1))
        elif self.kind == "blocks":
            q, k, v = self.fused(x).split([heads * size, groups * size, groups * size], -1)
            q = q.view(n, t, heads, size)
            k, v = (
                y.view(n, t, groups, size).repeat_interleave(heads // groups, 2) for y in (k, v)
            )
        elif self.kind == "keys are values":
            q = self.queries(x).view(n, t, heads, size)
            k = v = self.one(x).view(n, t, heads, size)
        else:
            q = self.queries(x).view(n, t, heads, size)
            k, v = self.pairs(x).view(n, t, 2, heads, size).unbind(2)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self.split(x))
        scores = q @ k.transpose(2, 3) / 2
        if self.kind == "biased":
            places = torch.arange(x.shape[1], dtype=x.dtype)
            distances = (places - places.unsqueeze(1)).view(1, x.shape[1], -1, 1)
            scores = scores + self.bias(distances).permute(0, 3, 1, 2)
        weights = scores.softmax(-1)
        if self.kind == "talking":
            weights = torch.einsum("nhts,hg->ngts", weights, self.mixing)
        seen = weights @ v
        if self.kind == "reversed":
            seen = seen.flip(1)
        x = x + self.project(seen.transpose(1, 2).flatten(2))
        if self.kind == "twice":
            x = x + self.project(seen.transpose(1, 2).flatten(2))
        return self.head(F.relu(self.inner(x)).mean(1))


class Encoder(nn.Module):
    """torch's own encoder layers, which call none of their attention's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))
