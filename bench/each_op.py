"""Every operator on small inputs of awkward sizes, on the GPU where there is one.

python -m bench.each_op          what compute-sanitizer watches

`calls` lists them for tests as well: of streams, of captured graphs, of waiting for the device. The
last line is one JSON object: how many calls were made, and of which operators.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.device import DEVICE, ON_GPU
from neusemslice import ops
from neusemslice.ops import CONTRIBUTION_STATISTICS, ClassStats, Gram

CLASSES = 3
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        name: the operator's, and what is special about the call.
        prepare: given a device, makes inputs and state, the same each time; what it returns makes
            the call and gives all tensors that hold results.
        waits: whether it waits for the device, because the size of its result is data.
    """

    name: str
    prepare: Callable[[torch.device], Callable[[], list[Tensor]]]
    waits: bool = False

    @property
    def op(self) -> str:
        return self.name.split()[0]


def calls() -> list[Call]:
    return [
        *_statistics(),
        *_contributions(),
        *_similarities(),
        *_optimizers(),
        *_grams(),
        *_row_gradients(),
    ]


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _labels(samples: int) -> Tensor:
    """With an ignored one, and a class that has none."""
    labels = torch.arange(samples) % (CLASSES - 1)
    labels[samples // 2 : samples // 2 + 1] = -100
    return labels


def _tensors(*states: ClassStats) -> list[Tensor]:
    return [t for state in states for t in state.tensors().values()]


def _statistics() -> Iterator[Call]:
    def class_order(device: torch.device) -> Callable[[], list[Tensor]]:
        labels = _labels(1000).to(device)
        return lambda: [*ops.class_order(labels, CLASSES)[:2]]

    yield Call("class_order", class_order)

    def observe(x: Tensor, neuron_dim: int = 1, weighted: bool = False, masked: bool = False):
        def prepare(device: torch.device) -> Callable[[], list[Tensor]]:
            samples = x.shape[0]
            values = x.to(device)
            order = ops.class_order(_labels(samples).to(device), CLASSES)
            weight = torch.arange(samples).double().to(device) if weighted else None
            shape = [n for d, n in enumerate(x.shape) if d != neuron_dim % x.ndim]
            mask = (_normal(*shape) < 1).to(device) if masked else None
            state = ClassStats.empty(CLASSES, x.shape[neuron_dim], device=device)

            def run() -> list[Tensor]:
                ops.class_stats_(
                    state, values, order, weight=weight, mask=mask, neuron_dim=neuron_dim
                )
                return _tensors(state)

            return run

        return prepare

    for dtype in DTYPES:
        for layout, x in {
            "rows": _normal(1201, 67, dtype=dtype),
            "strided rows": _normal(37, 134, dtype=dtype)[:, ::2],
            "planes": _normal(19, 7, 9, 5, dtype=dtype),
            "channels_last": _normal(19, 70, 9, 5, dtype=dtype).to(
                memory_format=torch.channels_last
            ),
        }.items():
            yield Call(f"class_stats_ {layout} {dtype}", observe(x))
        tokens = observe(_normal(9, 11, 67, dtype=dtype), -1, weighted=True, masked=True)
        yield Call(f"class_stats_ tokens {dtype}", tokens)
    yield Call("class_stats_ weighted rows", observe(_normal(700, 40), weighted=True))
    yield Call("class_stats_ empty", observe(_normal(0, 5)))

    def many(device: torch.device) -> Callable[[], list[Tensor]]:
        xs = [_normal(40, c, *([3] * (c % 2)), seed=c).to(device) for c in range(5, 21)]
        order = ops.class_order(_labels(40).to(device), CLASSES)
        states = [ClassStats.empty(CLASSES, x.shape[1], device=device) for x in xs]

        def run() -> list[Tensor]:
            ops.class_stats_many_(states, xs, order)
            return _tensors(*states)

        return run

    yield Call("class_stats_many_", many)

    def merge(device: torch.device) -> Callable[[], list[Tensor]]:
        states = []
        for seed in range(2):
            x = _normal(50, 70, seed=seed).to(device)
            states.append(ClassStats.empty(CLASSES, 70, device=device))
            ops.class_stats_(states[-1], x, ops.class_order(_labels(50).to(device), CLASSES))

        def run() -> list[Tensor]:
            ops.class_stats_merge_(*states)
            return _tensors(states[0])

        return run

    yield Call("class_stats_merge_", merge)


def _contributions() -> Iterator[Call]:
    def contribute(x: Tensor, dtype: torch.dtype, neuron_dim: int = 1, masked: bool = False):
        def prepare(device: torch.device) -> Callable[[], list[Tensor]]:
            values = x.to(device)
            g = _normal(*x.shape, dtype=dtype, seed=1).to(device)
            order = ops.class_order(_labels(x.shape[0]).to(device), CLASSES)
            mask = (_normal(*x.shape[:2]) < 1).to(device) if masked else None
            weight = torch.arange(x.shape[0]).double().to(device) if masked else None
            state = ClassStats.empty(
                CLASSES, x.shape[neuron_dim], CONTRIBUTION_STATISTICS, device=device
            )

            def run() -> list[Tensor]:
                ops.contribution_(
                    state, values, g, order, weight=weight, mask=mask, neuron_dim=neuron_dim
                )
                return _tensors(state)

            return run

        return prepare

    for dtype in DTYPES:
        for other in (torch.float32, dtype):
            rows = contribute(_normal(1201, 67, dtype=dtype), other)
            yield Call(f"contribution_ rows {dtype} {other}", rows)
        x = _normal(19, 70, 9, 5, dtype=dtype)
        yield Call(f"contribution_ planes {dtype}", contribute(x, dtype))
        last = x.to(memory_format=torch.channels_last)
        yield Call(f"contribution_ channels_last {dtype}", contribute(last, dtype))
        tokens = contribute(_normal(9, 11, 67, dtype=dtype), dtype, -1, masked=True)
        yield Call(f"contribution_ tokens {dtype}", tokens)


def _similarities() -> Iterator[Call]:
    def with_input(make: Callable[[], Tensor], run: Callable[[Tensor], object]):
        def prepare(device: torch.device) -> Callable[[], list[Tensor]]:
            given = make().to(device)

            def call() -> list[Tensor]:
                found = run(given)
                return [found] if isinstance(found, Tensor) else list(found)  # type: ignore[call-overload]

            return call

        return prepare

    def bits() -> Tensor:
        return _normal(150, 131) < 0.5

    def words() -> Tensor:
        return ops.bitset_pack(bits())

    yield Call("bitset_pack", with_input(bits, ops.bitset_pack))
    for metric in ("jaccard", "overlap", "containment"):
        for name, run, waits in (
            ("bitset_similarity", lambda a, m=metric: ops.bitset_similarity(a, None, m), False),
            (
                "bitset_similarity_edges",
                lambda a, m=metric: ops.bitset_similarity_edges(a, None, m, threshold=0.4),
                True,
            ),
            (
                "bitset_similarity_topk",
                lambda a, m=metric: ops.bitset_similarity_topk(a, None, m, k=5),
                False,
            ),
        ):
            yield Call(f"{name} {metric}", with_input(words, run), waits)
    for dtype in DTYPES:
        rows = lambda dtype=dtype: _normal(150, 33, dtype=dtype)  # noqa: E731
        for metric in ("cosine", "pearson", "dot"):
            for name, run, waits in (
                (
                    "pairwise_similarity",
                    lambda a, m=metric: ops.pairwise_similarity(a, None, m),
                    False,
                ),
                (
                    "pairwise_similarity_edges",
                    lambda a, m=metric: ops.pairwise_similarity_edges(a, None, m, threshold=0.2),
                    True,
                ),
                (
                    "pairwise_similarity_topk",
                    lambda a, m=metric: ops.pairwise_similarity_topk(a, None, m, k=5),
                    False,
                ),
            ):
                yield Call(f"{name} {metric} {dtype}", with_input(rows, run), waits)


def _optimizers() -> Iterator[Call]:
    def step(dtype: torch.dtype, adamw: bool):
        def prepare(device: torch.device) -> Callable[[], list[Tensor]]:
            shapes, dims = ((9, 7), (5, 3, 3, 3), (33,)), (0, 1, 0)
            rows = [torch.tensor(r).to(device) for r in ((0, 3, 8), (1, 2), (0, 32))]
            state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            params = [_normal(*s, dtype=dtype).to(device) for s in shapes]
            grads = [_normal(*s, dtype=dtype, seed=1).to(device) for s in shapes]
            kinds = 2 if adamw else 1
            states = [
                [
                    torch.zeros_like(p.index_select(d, r), dtype=state_dtype)
                    for p, d, r in zip(params, dims, rows, strict=True)
                ]
                for _ in range(kinds)
            ]
            steps = [torch.zeros(len(r), device=device) for r in rows]
            lr = torch.tensor(0.1, dtype=torch.float64, device=device)

            def run() -> list[Tensor]:
                if adamw:
                    ops.masked_adamw_(params, grads, *states, [], [], steps, rows, dims, lr)
                else:
                    ops.masked_sgd_(params, grads, *states, [], steps, rows, dims, lr, momentum=0.9)
                return [*params, *(t for kind in states for t in kind), *steps]

            return run

        return prepare

    for dtype in DTYPES:
        yield Call(f"masked_sgd_ {dtype}", step(dtype, adamw=False))
        yield Call(f"masked_adamw_ {dtype}", step(dtype, adamw=True))


def _grams() -> Iterator[Call]:
    def add(x: Tensor):
        def prepare(device: torch.device) -> Callable[[], list[Tensor]]:
            state, rows = Gram.empty(x.shape[1], device), x.to(device)

            def run() -> list[Tensor]:
                ops.gram_(state, rows)
                return [state.count, state.mean, state.products]

            return run

        return prepare

    for dtype in DTYPES:
        yield Call(f"gram_ {dtype}", add(_normal(1100, 67, dtype=dtype)))
    yield Call("gram_ empty", add(_normal(0, 5)))


def _row_gradients() -> Iterator[Call]:
    def of(grad: Tensor, x: Tensor, run: Callable[..., Tensor | tuple[Tensor, ...]]):
        def prepare(device: torch.device) -> Callable[[], list[Tensor]]:
            rows = torch.tensor([0, 3, 5, 6]).to(device)
            given = (grad.to(device), x.to(device))

            def call() -> list[Tensor]:
                found = run(*given, rows)
                return [found] if isinstance(found, Tensor) else list(found)

            return call

        return prepare

    for dtype in DTYPES:
        tokens = [_normal(9, 11, n, dtype=dtype, seed=n) for n in (7, 13)]
        yield Call(f"rows_linear_backward {dtype}", of(*tokens, ops.rows_linear_backward))
        planes = [_normal(5, n, 9, 6, dtype=dtype, seed=n) for n in (7, 4)]
        # As many groups as give each of the ways that a grouped convolution takes on CUDA.
        for inputs, outputs, groups in ((4, 7, 1), (4, 8, 2), (8, 8, 4), (6, 9, 3)):
            conv = of(
                _normal(5, outputs, 9, 6, dtype=dtype),
                _normal(5, inputs, 9, 6, dtype=dtype, seed=1),
                lambda grad, x, rows, groups=groups: ops.rows_conv_backward(
                    grad, x, rows, (3, 3), (1, 1), (1, 1), (1, 1), groups
                ),
            )
            yield Call(f"rows_conv_backward {groups} groups {dtype}", conv)
        bias = of(*planes, lambda grad, _, rows: ops.rows_bias_backward(grad, rows, 1))
        yield Call(f"rows_bias_backward {dtype}", bias)
        for form in (torch.contiguous_format, torch.channels_last):
            maps = (
                _normal(5, 7, 9, 6, dtype=dtype, seed=n).contiguous(memory_format=form)
                for n in (7, 4)
            )
            yield Call(f"rows_norm_backward {form} {dtype}", of(*maps, _norm))


def _norm(grad: Tensor, x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    mean = torch.linspace(-1, 1, x.shape[1], device=x.device)
    return ops.rows_norm_backward(grad, x, mean, mean.exp(), 1e-5, rows, rows[:2])


def main() -> None:
    made = calls()
    for call in made:
        run = call.prepare(DEVICE)
        run()
        run()
        if ON_GPU:
            torch.cuda.synchronize()
    print(json.dumps({"calls": len(made), "ops": sorted({call.op for call in made})}))


if __name__ == "__main__":
    main()
