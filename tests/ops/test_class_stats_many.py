"""class_stats_many_ against as many calls of class_stats_."""

from dataclasses import replace

import pytest
import torch
from helpers import layouts, same_bits
from torch.library import opcheck

from neusemslice import ops
from neusemslice.ops import ClassStats


def sites_of(device: torch.device, samples: int = 40) -> list[dict]:
    """Layers of every layout, one with a mask, one of half precision, more than one launch has."""
    image = torch.randn(samples, 6, 4, 5, device=device)
    kinds = [
        {"x": torch.randn(samples, 19, device=device)},
        {"x": torch.randn(samples, 8, device=device).bfloat16()},
        {"x": image},
        {"x": image.to(memory_format=torch.channels_last)},
        {
            "x": torch.randn(samples, 7, 9, device=device),
            "mask": torch.rand(samples, 7, device=device) > 0.3,
            "neuron_dim": -1,
        },
    ]
    return [kinds[i % len(kinds)] for i in range(14)]


def states_of(sites: list[dict], num_classes: int, **options) -> list[ClassStats]:
    return [
        ClassStats.empty(
            num_classes,
            site["x"].shape[site.get("neuron_dim", 1)],
            device=site["x"].device,
            **options,
        )
        for site in sites
    ]


def observe_many(states: list[ClassStats], sites: list[dict], order, weight=None) -> None:
    ops.class_stats_many_(
        states,
        [site["x"] for site in sites],
        order,
        weight=weight,
        masks=[site.get("mask") for site in sites],
        neuron_dims=[site.get("neuron_dim", 1) for site in sites],
    )


def assert_same(states: list[ClassStats], expected: list[ClassStats]) -> None:
    for i, (a, b) in enumerate(zip(states, expected, strict=True)):
        for name, tensor in a.tensors().items():
            assert same_bits(tensor, b.tensors()[name]), f"site {i}: {name}"


class TestValues:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize("statistics", [ops.STATISTICS, ("mean",), ("max", "active"), ()])
    def test_equals_separate_calls(self, statistics, soft, weighted, device):
        sites = sites_of(device)
        labels = torch.rand(40, 3) if soft else torch.randint(0, 3, (40,))
        order = ops.class_order(labels.to(device), 3)
        weight = torch.rand(40, device=device) if weighted else None
        together = states_of(sites, 3, statistics=statistics)
        alone = states_of(sites, 3, statistics=statistics)
        for _ in range(2):
            observe_many(together, sites, order, weight)
            for state, site in zip(alone, sites, strict=True):
                options = {key: site[key] for key in ("mask", "neuron_dim") if key in site}
                ops.class_stats_(state, site["x"], order, weight=weight, **options)
        assert_same(together, alone)

    def test_no_sites(self, device):
        order = ops.class_order(torch.zeros(3, dtype=torch.int64, device=device), 2)
        ops.class_stats_many_([], [], order)

    def test_no_samples(self, device):
        sites = sites_of(device, samples=0)
        states = states_of(sites, 2)
        order = ops.class_order(torch.zeros(0, dtype=torch.int64, device=device), 2)
        observe_many(states, sites, order)
        assert_same(states, states_of(sites, 2))


class TestContract:
    def test_raises_versions(self, device):
        sites = sites_of(device)[:2]
        states = states_of(sites, 2)
        before = [t._version for state in states for t in state.tensors().values()]
        observe_many(states, sites, ops.class_order(torch.randint(0, 2, (40,), device=device), 2))
        after = [t._version for state in states for t in state.tensors().values()]
        assert after == [version + 1 for version in before]

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": torch.zeros(40, 3)}, ValueError, r"site 1: x must have 8 neurons"),
            ({"x": torch.zeros(40, 8, dtype=torch.int64)}, TypeError, r"site 1: x must be float64"),
            ({"x": torch.zeros(39, 8)}, ValueError, r"site 1: order must have shape \[39\]"),
            ({"mask": torch.zeros(40, 2).bool()}, ValueError, r"site 1: mask must have shape"),
            ({"neuron_dim": 4}, ValueError, r"site 1: neuron_dim must name a dimension"),
        ],
        ids=["neurons", "dtype", "samples", "mask", "neuron_dim"],
    )
    def test_names_the_site_and_changes_nothing(self, change, error, message, device):
        sites = sites_of(device)[:3]
        states = states_of(sites, 2)
        changed = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
        sites[1] = {**sites[1], **changed}
        order = ops.class_order(torch.randint(0, 2, (40,), device=device), 2)
        with pytest.raises(error, match=f"class_stats_many_: {message}"):
            observe_many(states, sites, order)
        assert_same(states, states_of(sites_of(device)[:3], 2))

    def test_refuses_bad_weights_on_the_cpu_and_changes_nothing(self):
        sites = sites_of(torch.device("cpu"))[:2]
        states = states_of(sites, 2)
        weight = torch.ones(40)
        weight[4] = -1
        order = ops.class_order(torch.randint(0, 2, (40,)), 2)
        with pytest.raises(ValueError, match="site 0: weight must be finite and not negative"):
            observe_many(states, sites, order, weight)
        assert_same(states, states_of(sites, 2))

    def test_refuses_lists_that_do_not_fit(self, device):
        sites = sites_of(device)[:2]
        states = states_of(sites, 2)
        order = ops.class_order(torch.randint(0, 2, (40,), device=device), 2)
        xs = [site["x"] for site in sites]
        with pytest.raises(ValueError, match=r"counts must have 1 entries.*got 2"):
            ops.class_stats_many_(states, xs[:1], order)
        with pytest.raises(ValueError, match=r"masks must have 2 entries.*got 1"):
            ops.class_stats_many_(states, xs, order, masks=[None])
        with pytest.raises(ValueError, match=r"neuron_dims must have 2 entries.*got 3"):
            ops.class_stats_many_(states, xs, order, neuron_dims=[1, 1, 1])
        with pytest.raises(ValueError, match=r"site 1: the state must hold .*'max'.* as that of"):
            ops.class_stats_many_([states[0], replace(states[1], max=None)], xs, order)
        with pytest.raises(ValueError, match="site 1: the state must not be another site's"):
            ops.class_stats_many_([states[0], states[0]], [xs[0], xs[0]], order)
        assert_same(states, states_of(sites, 2))

    def test_refuses_mixed_devices(self):
        sites = sites_of(torch.device("cpu"))[:2]
        order = ops.class_order(torch.zeros(40, dtype=torch.int64), 1)
        xs = [sites[0]["x"], sites[1]["x"].to("meta")]
        with pytest.raises(ValueError, match="class_stats_many_: all tensors must be on one dev"):
            ops.class_stats_many_(states_of(sites, 1), xs, order)


class TestTorch:
    @pytest.mark.parametrize("layout", ["contiguous", "sliced", "permuted", "requires_grad"])
    def test_opcheck(self, layout, device):
        def planes(statistics):
            states = [ClassStats.empty(2, 3, statistics, device) for _ in range(2)]
            names = ("count", "positions", "nonfinite", *ops.STATISTICS)
            return [[getattr(s, n) for s in states if getattr(s, n) is not None] for n in names]

        x = layouts((7, 3), torch.float32, device)[layout]
        order = ops.class_order(torch.randint(0, 2, (7,), device=device), 2)
        mask = torch.ones(7, dtype=torch.bool, device=device)
        weight = torch.rand(7, device=device)
        op = torch.ops.neusemslice.class_stats_many_.default
        opcheck(op, (*planes(ops.STATISTICS), [x, x], *order, None, [None, None], [1, 1]))
        opcheck(op, (*planes(("max",)), [x, x], *order, weight, [None, mask], [1, -1]))
        opcheck(op, (*[[] for _ in range(8)], [], *order, None, [], []))

    def test_compiles_without_a_graph_break(self, device):
        def step(states, x, labels):
            y, order = (x * 2).relu(), ops.class_order(labels, 3)
            ops.class_stats_many_(states, [x, y], order)

        x, labels = torch.randn(20, 6, device=device), torch.randint(0, 3, (20,), device=device)
        eager, compiled = ([ClassStats.empty(3, 6, device=device) for _ in range(2)] for _ in "ab")
        step(eager, x, labels)
        torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, x, labels)
        assert_same(compiled, eager)
        torch.compiler.reset()
