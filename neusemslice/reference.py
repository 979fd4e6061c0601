"""Float64 oracles: each operator again, slow and obvious, for the tests to compare with.

Nothing here shares code with the operators.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neusemslice.ops.class_stats import ClassStats


def class_order(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Order and offsets, by asking for each class in turn which samples carry it."""
    listed = labels.tolist()
    groups = [[i for i, y in enumerate(listed) if y == k] for k in range(num_classes)]
    rest = [i for i, y in enumerate(listed) if y == -100]
    offsets = [sum(len(group) for group in groups[:k]) for k in range(num_classes + 1)]
    flat = [i for group in groups for i in group] + rest
    return torch.tensor(flat, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64)


def class_stats(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    neuron_dim: int = 1,
) -> ClassStats:
    """The state after all samples of ``x`` at once, two-pass, in float64 throughout.

    Shapes as ``ops.class_stats_``, labels as ``ops.class_order``. All statistics are
    float64 here, of finite input.
    """
    values = x.double().movedim(neuron_dim, -1)
    samples, neurons = values.shape[0], values.shape[-1]
    positions = math.prod(values.shape[1:-1])
    values = values.reshape(samples, positions, neurons)
    weights = torch.ones(samples) if weight is None else weight
    weights = weights.double()
    kept = torch.ones(samples, positions, dtype=torch.bool)
    if mask is not None:
        kept = mask.reshape(samples, positions)
    state = ClassStats.empty(num_classes, neurons)
    state.mean_abs = torch.zeros(num_classes, neurons, dtype=torch.float64)
    state.active = torch.zeros(num_classes, neurons, dtype=torch.float64)
    state.max = torch.full((num_classes, neurons), -torch.inf, dtype=torch.float64)
    assert state.mean is not None
    assert state.m2 is not None
    if labels.ndim == 1:
        labels = labels.unsqueeze(1) == torch.arange(num_classes)
    for k in range(num_classes):
        in_class = weights * labels[:, k].double()
        chosen = [n for n in range(samples) if in_class[n] > 0 and bool(kept[n].any())]
        if not chosen:
            continue
        w = in_class[chosen]
        pooled = torch.stack([values[n][kept[n]].mean(0) for n in chosen])
        mean = (w[:, None] * pooled).sum(0) / w.sum()
        state.count[k] = w.sum()
        state.mean[k] = mean
        state.m2[k] = (w[:, None] * (pooled - mean) ** 2).sum(0)
        every = torch.cat([values[n][kept[n]] for n in chosen])
        every_weight = torch.cat([in_class[n].expand(int(kept[n].sum())) for n in chosen])
        state.positions[k] = every_weight.sum()
        share = (every_weight / every_weight.sum())[:, None]
        state.mean_abs[k] = (share * every.abs()).sum(0)
        state.active[k] = (share * (every > 0)).sum(0)
        state.max[k] = every.max(0).values
    return state


def contribution(
    x: Tensor,
    g: Tensor,
    labels: Tensor,
    num_classes: int,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    neuron_dim: int = 1,
) -> ClassStats:
    """The contributions of all samples of ``x`` and ``g`` at once, sample by sample, in float64.

    Shapes as ``ops.contribution_``, labels as ``ops.class_order``.
    """
    samples, neurons = x.shape[0], x.shape[neuron_dim]
    products = (
        (x.double() * g.double())
        .movedim(neuron_dim, -1)
        .reshape(samples, math.prod(x.shape[1:]) // max(neurons, 1), neurons)
    )
    state = ClassStats.empty(num_classes, neurons, ("mean",))
    state.mean_abs = torch.zeros(num_classes, neurons, dtype=torch.float64)
    assert state.mean is not None
    if labels.ndim == 1:
        labels = labels.unsqueeze(1) == torch.arange(num_classes)
    for k in range(num_classes):
        for n in range(samples):
            w = float(labels[n, k]) * (1.0 if weight is None else float(weight[n]))
            kept = products[n] if mask is None else products[n][mask[n].flatten()]
            if w == 0 or len(kept) == 0:
                continue
            state.nonfinite += (~kept.isfinite()).sum(0)
            q = kept.where(kept.isfinite(), 0.0).mean(0)
            state.count[k] += w
            state.positions[k] += w
            state.mean[k] += w * q
            state.mean_abs[k] += w * q.abs()
        if state.count[k] > 0:
            state.mean[k] /= state.count[k]
            state.mean_abs[k] /= state.count[k]
    return state


def bitset_pack(bits: Tensor) -> Tensor:
    """Words of the sets, one element after the other, in Python's integers."""
    *outer, size = bits.shape
    words = (size + 63) // 64
    packed = []
    for row in bits.reshape(math.prod(outer), size).tolist():
        number = sum(1 << j for j, present in enumerate(row) if present)
        for w in range(words):
            word = (number >> (64 * w)) % 2**64
            packed.append(word - 2**64 if word >= 2**63 else word)
    return torch.tensor(packed, dtype=torch.int64).reshape(*outer, words)


def set_similarity(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Float64 similarity of sets given as bool ``[R, M]`` and ``[S, M]``, by Python's sets."""
    left, right = (
        [{j for j, present in enumerate(row) if present} for row in bits.tolist()]
        for bits in (a, b)
    )

    def similarity(i: set[int], j: set[int]) -> float:
        common = len(i & j)
        whole = {
            "jaccard": len(i | j),
            "dice": len(i) + len(j),
            "overlap": min(len(i), len(j)),
            "containment": len(i),
        }[metric]
        if whole == 0:
            return 0.0
        return (2 * common if metric == "dice" else common) / whole

    values = [[similarity(i, j) for j in right] for i in left]
    return torch.tensor(values, dtype=torch.float64).reshape(a.shape[0], b.shape[0])


def pairwise_similarity(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Float64 similarity of finite rows, pair by pair with exact sums.

    The metric is cosine, pearson or dot.
    """

    def prepared(row: list[float]) -> list[float]:
        if metric == "dot":
            return row
        if metric == "pearson" and row:
            if min(row) == max(row):
                return [0.0] * len(row)
            mean = math.fsum(row) / len(row)
            row = [x - mean for x in row]
        norm = math.sqrt(math.fsum(x * x for x in row))
        return [x / norm if norm else 0.0 for x in row]

    left, right = ([prepared(row) for row in x.double().tolist()] for x in (a, b))
    values = [[math.fsum(x * y for x, y in zip(i, j, strict=True)) for j in right] for i in left]
    similarity = torch.tensor(values, dtype=torch.float64).reshape(a.shape[0], b.shape[0])
    return similarity if metric == "dot" else similarity.clamp(-1, 1)


def nearest(similarity: Tensor, k: int, *, own: bool) -> tuple[Tensor, Tensor]:
    """The columns of the ``k`` greatest values of each row, and the values; ties by index.

    With ``own``, row and column of one number are the same thing and no neighbours. NaN is no
    neighbour; -1 and NaN fill a row that has too few.
    """
    columns, values = [], []
    for r, row in enumerate(similarity.tolist()):
        met = [(-x, c) for c, x in enumerate(row) if not math.isnan(x) and not (own and c == r)]
        best = sorted(met)[:k] + [(math.nan, -1)] * (k - len(met))
        columns.append([c for _, c in best])
        values.append([-x for x, _ in best])
    shape = (len(similarity), k)
    return (
        torch.tensor(columns, dtype=torch.int64).reshape(shape),
        torch.tensor(values, dtype=similarity.dtype).reshape(shape),
    )


def unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """HSIC_1 of Song et al. 2012 for linear kernels, float64, as its formula stands."""
    n = len(x)
    k, m = ((z.double() @ z.double().t()).fill_diagonal_(0) for z in (x, y))
    between = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return ((k * m).sum() + between - 2 * (k @ m).sum() / (n - 2)) / (n * (n - 3))


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased linear CKA of two layers' activations of the same samples ``[N, p]``, ``[N, q]``."""
    return unbiased_hsic(x, y) / (unbiased_hsic(x, x) * unbiased_hsic(y, y)).sqrt()


def _whole(compact: Tensor | None, shape: torch.Size, rows: Tensor, dim: int) -> Tensor:
    """A dense float64 tensor that holds `compact` in its tuned rows, and 0 elsewhere."""
    dense = torch.zeros(shape, dtype=torch.float64)
    return dense if compact is None else dense.index_copy(dim, rows, compact.double())


def _with_master(param: Tensor, master: Tensor | None, rows: Tensor, dim: int) -> Tensor:
    """The parameter in float64, its tuned rows from where the step takes them."""
    old = param.double()
    return old if master is None else old.index_copy(dim, rows, master.double())


def _dense_gradient(grad: Tensor, shape: torch.Size, rows: Tensor, dim: int) -> Tensor:
    return grad.double() if grad.shape == shape else _whole(grad, shape, rows, dim)


def _per_row(steps: Tensor | None, shape: torch.Size, rows: Tensor, dim: int) -> Tensor:
    """The updates that each row has had, float64, ready to broadcast over the parameter."""
    counts = torch.zeros(shape[dim], dtype=torch.float64)
    if steps is not None:
        counts[rows] = steps.double()
    return counts.reshape([-1 if d == dim else 1 for d in range(len(shape))])


def masked_sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    steps: Tensor | None,
    rows: Tensor,
    neuron_dim: int,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    master: Tensor | None = None,
) -> dict[str, Tensor]:
    """The parameter and its compact state after one step, in float64.

    The step is taken densely, for every row; the tuned rows are then copied into the old values.
    Shapes as ``ops.masked_sgd_``.
    """
    dim = neuron_dim % param.dim()
    old = _with_master(param, master, rows, dim)
    g = _dense_gradient(grad, param.shape, rows, dim) / grad_scale
    g = (-g if maximize else g) + weight_decay * old
    buffer = _whole(momentum_buffer, param.shape, rows, dim)
    counts = _per_row(steps, param.shape, rows, dim)
    if momentum != 0:
        buffer = torch.where(counts == 0, g, momentum * buffer + (1 - dampening) * g)
        g = g + momentum * buffer if nesterov else buffer
    dense = {"param": old - lr * g, "momentum_buffer": buffer}
    after = {name: tensor.index_select(dim, rows) for name, tensor in dense.items()}
    after["param"] = old.index_copy(dim, rows, after["param"])
    after["step"] = counts.flatten()[rows] + 1
    return after


def masked_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    steps: Tensor,
    rows: Tensor,
    neuron_dim: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decoupled_weight_decay: bool = True,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    master: Tensor | None = None,
) -> dict[str, Tensor]:
    """As ``masked_sgd``, for Adam and AdamW. Shapes as ``ops.masked_adamw_``."""
    dim = neuron_dim % param.dim()
    old = _with_master(param, master, rows, dim)
    g = _dense_gradient(grad, param.shape, rows, dim) / grad_scale
    g = -g if maximize else g
    if not decoupled_weight_decay:
        g, weight_decay = g + weight_decay * old, 0.0
    t = _per_row(steps, param.shape, rows, dim) + 1
    m = beta1 * _whole(exp_avg, param.shape, rows, dim) + (1 - beta1) * g
    v = beta2 * _whole(exp_avg_sq, param.shape, rows, dim) + (1 - beta2) * g**2
    bound = torch.maximum(_whole(max_exp_avg_sq, param.shape, rows, dim), v)
    corrected = (bound if amsgrad else v) / (1 - beta2**t)
    new = old - lr * weight_decay * old - lr * m / (1 - beta1**t) / (corrected.sqrt() + eps)
    dense = {"param": new, "exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": bound}
    after = {name: tensor.index_select(dim, rows) for name, tensor in dense.items()}
    after["param"] = old.index_copy(dim, rows, after["param"])
    after["step"] = t.flatten()[rows]
    return after


def deeplift_relu(
    layers: list[tuple[Tensor, Tensor]], x: Tensor, baseline: Tensor, target: int
) -> list[list[float]]:
    """DeepLIFT's contributions to one logit of one sample, by the rescale rule, neuron by neuron.

    Args:
        layers: weight ``[out, in]`` and bias ``[out]`` of linear layers with a ReLU between them.
        x, baseline: flat inputs.
        target: index of the logit.

    Returns:
        The contributions of the input, and of each layer's activations but the last's.
    """
    activations: list[list[list[float]]] = []  # of sample and baseline: per layer, per neuron
    sums: list[list[list[float]]] = []
    for start in (x, baseline):
        a = start.double().tolist()
        activations.append([a])
        sums.append([])
        for weight, bias in layers:
            rows = zip(weight.double().tolist(), bias.double().tolist(), strict=True)
            z = [
                math.fsum(w * v for w, v in zip(row, a, strict=True)) + shift for row, shift in rows
            ]
            a = [max(v, 0.0) for v in z]
            sums[-1].append(z)
            activations[-1].append(a)
    contributions: list[list[float]] = []
    of_sums = [float(j == target) for j in range(len(sums[0][-1]))]
    for depth in reversed(range(len(layers))):
        rows_of = layers[depth][0].double().tolist()
        here, there = activations[0][depth], activations[1][depth]
        multipliers = [
            math.fsum(of_sums[j] * rows_of[j][i] for j in range(len(rows_of)))
            for i in range(len(here))
        ]
        contributions.append(
            [m * (a - b) for m, a, b in zip(multipliers, here, there, strict=True)]
        )
        if depth:
            before = zip(sums[0][depth - 1], sums[1][depth - 1], strict=True)
            of_sums = [
                m * ((max(z, 0.0) - max(w, 0.0)) / (z - w) if z != w else float(z > 0))
                for m, (z, w) in zip(multipliers, before, strict=True)
            ]
    return contributions[::-1]


def gram(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and products about the mean of all rows of ``x`` at once, in float64."""
    values = x.double()
    mean = values.mean(0) if len(values) else values.new_zeros(values.shape[1])
    centred = values - mean
    products = (
        torch.stack([(centred[:, i : i + 1] * centred).sum(0) for i in range(values.shape[1])])
        if values.shape[1]
        else values.new_zeros(0, 0)
    )
    return torch.tensor(float(len(values)), dtype=torch.float64), mean, products
