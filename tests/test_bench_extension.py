"""The rivals of extension do what was published, and the study compares what it says."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import quick
from torch import nn

from bench import extension, mnist
from bench.continual.deeparc import DeepArc, redundant
from bench.continual.ewc import EWC, SAMPLES
from bench.continual.learner import Divided, HeadOnly, Naive, Setting
from bench.continual.lwf import TEMPERATURE, LwF, distillation
from bench.continual.ours import Ours
from bench.continual.packnet import FREE, PackNet, PackNetNorms, prune
from bench.continual.problem import Problem, digits_problem, halves, local, pairs
from bench.continual.replay import Replay10, with_replay

needs_mnist = pytest.mark.skipif(mnist.missing() is not None, reason=str(mnist.missing()))
SETTING = Divided(1e-2, 1.0, old_rate=1e-2)


@pytest.fixture(scope="module")
def digits() -> Problem:
    return digits_problem(halves(10))


@pytest.fixture(scope="module")
def base(digits):
    return digits._trained_base(digits.data.train.of(digits.tasks[0]), 0).eval()


def learned(method, digits, base, setting=SETTING):
    learner = method(digits, base, setting, 0)
    learner.prepare(digits.stream(digits.data.train.of(digits.tasks[0]), 1))
    prepared = {k: v.clone() for k, v in learner.backbone.state_dict().items()}
    learner.learn(digits.tasks[1], digits.stream(digits.data.train.of(digits.tasks[1]), 2))
    return learner, prepared


def changed(learner, prepared):
    return {k for k, v in learner.backbone.state_dict().items() if not torch.equal(v, prepared[k])}


@pytest.mark.parametrize(
    "method", dict.fromkeys(extension.METHODS.values()), ids=lambda m: m.__name__
)
def test_every_method_learns_new_classes_and_leaves_the_base_alone(method, digits, base):
    given = {k: v.clone() for k, v in base.state_dict().items()}
    found = extension.measured(digits, base, method, SETTING, 0)
    assert found["matrix"][-1][1] > 60
    assert all(torch.equal(v, given[k]) for k, v in base.state_dict().items())


def test_all_begin_with_the_same_network_and_the_same_head(digits, base):
    learners = [method(digits, base, SETTING, 3) for method in (Naive, HeadOnly, PackNet)]
    for learner in learners:
        learner.add_head(digits.tasks[1])
    first = learners[0]
    for other in learners[1:]:
        assert torch.equal(first.answers(digits.data.test, 0), other.answers(digits.data.test, 0))
        assert torch.equal(first.heads[1].weight, other.heads[1].weight)


def test_naive_retraining_changes_everything_but_the_old_head(digits, base):
    learner, prepared = learned(Naive, digits, base)
    assert changed(learner, prepared) == set(prepared)
    assert torch.equal(learner.heads[0].weight, base[-1].weight)


def test_a_new_head_alone_changes_nothing_old(digits, base):
    learner, prepared = learned(HeadOnly, digits, base)
    assert not changed(learner, prepared)
    assert torch.equal(learner.before[0], learner.answers(digits.data.test, 0))


class TestReplay:
    def test_mixes_a_share_of_old_images_in(self, digits):
        old, new = digits.tasks
        pool = with_replay(digits.data.train, old, new, 0.1, 0)
        assert len(pool.of(old)) == round(0.1 * len(digits.data.train.of(old)))
        assert len(pool.of(new)) == len(digits.data.train.of(new))
        other = with_replay(digits.data.train, old, new, 0.1, 1)
        assert not torch.equal(pool.pixels, other.pixels)

    def test_asks_for_the_class_among_all(self, digits, base):
        learner = Replay10(digits, base, SETTING, 0)
        learner.add_head(digits.tasks[1])
        images = digits.data.test[:16]
        logits = learner.scores(images).double()
        wanted = -logits.log_softmax(1)[torch.arange(16), images.labels].mean()
        found = learner.loss(digits.data.normalised(images.pixels), images.labels).detach()
        assert float(found) == pytest.approx(float(wanted), rel=1e-5)

    def test_forgets_less_than_naive_retraining(self, digits, base):
        old = [learned(m, digits, base)[0] for m in (Naive, Replay10)]
        naive, replayed = (extension.accuracy(learner, 0) for learner in old)
        assert replayed > naive


class TestEWC:
    def test_fisher_information_is_that_of_the_answers(self, digits):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Linear(3, 5))
        learner = EWC(digits, model, Setting(1e-3, 10.0), 0)
        stream = digits.stream(digits.data.train.of(digits.tasks[0]), 1)
        learner.prepare(stream)
        x = torch.cat([x for x, _ in digits.stream(stream.images, 1)])[:SAMPLES].flatten(1)
        generator = torch.Generator().manual_seed(0)
        first, last = (layer.weight.detach().double() for layer in model[1:])
        with torch.no_grad():
            shares = model(x).softmax(1)
        total = torch.zeros(3, 64, dtype=torch.float64)
        for row, share in zip(x.double(), shares, strict=True):
            drawn = torch.multinomial(share, 1, generator=generator)
            error = F.one_hot(drawn[0], 5).double() - share.double()
            total += torch.outer(last.t() @ error, row) ** 2
        fisher, anchor = learner.anchors[0]
        torch.testing.assert_close(fisher[0].double(), total / len(x), rtol=1e-4, atol=1e-9)
        assert torch.equal(anchor[0].double(), first)

    def test_the_penalty_is_the_weighted_square_of_the_way(self, digits, base):
        learner = EWC(digits, base, SETTING, 0)
        parameters = list(learner.backbone.parameters())
        fisher = [torch.full_like(p, 2.0) for p in parameters]
        learner.anchors = [(fisher, [p.detach() - 0.5 for p in parameters])]
        count = sum(p.numel() for p in parameters)
        assert float(learner.penalty().detach()) == pytest.approx(2 * 0.25 * count, rel=1e-5)

    def test_a_strong_penalty_keeps_old_classes(self, digits, base):
        weak, strong = (
            learned(EWC, digits, base, Setting(1e-2, strength))[0] for strength in (0.0, 1e4)
        )
        assert extension.accuracy(strong, 0) > extension.accuracy(weak, 0)


class TestLwF:
    def test_distillation_is_the_cross_entropy_of_softened_answers(self):
        generator = torch.Generator().manual_seed(0)
        given, wanted = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator)
        soft = (wanted / TEMPERATURE).exp()
        soft /= soft.sum(1, keepdim=True)
        answer = (given / TEMPERATURE).exp()
        answer /= answer.sum(1, keepdim=True)
        expected = -(soft * answer.log()).sum() / 6
        torch.testing.assert_close(distillation(given, wanted), expected)

    def test_distillation_is_least_where_the_answers_agree(self):
        wanted = torch.randn(6, 4, dtype=torch.float64)
        given = wanted.clone().requires_grad_()
        distillation(given, wanted).backward()
        assert float(given.grad.abs().max()) < 1e-12

    def test_old_heads_are_held_to_what_they_said(self, digits, base):
        learner, _ = learned(LwF, digits, base)
        x, y = next(iter(digits.stream(digits.data.train.of(digits.tasks[1]), 3)))
        with torch.no_grad():
            own = Naive.loss(learner, x, y)
            total = learner.loss(x, y)
            said = base.eval()(x)
            held = distillation(learner.heads[0](learner.backbone(x)), said)
        torch.testing.assert_close(total, own + held)


class TestDeepArc:
    def test_layers_that_say_the_same_again_are_redundant(self):
        model = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(),
            nn.Linear(4, 2),
        )  # fmt: skip
        with torch.no_grad():
            model[2].weight.copy_(2 * torch.eye(8))
            model[2].bias.zero_()
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
        assert "2" in redundant(model, [(x, torch.zeros(64, dtype=torch.int64))])

    def test_only_chosen_layers_change(self, digits, base):
        learner, prepared = learned(DeepArc, digits, base)
        assert learner.chosen
        touched = {name.partition(".")[0] for name in changed(learner, prepared)}
        # A norm stands behind its convolution.
        allowed = {str(int(name) + step) for name in learner.chosen for step in (0, 1)}
        assert touched
        assert touched <= allowed


class TestPackNet:
    def test_the_smallest_of_a_tasks_own_weights_are_freed(self):
        weight = torch.tensor([[0.1, -4.0, 3.0], [-0.2, 0.0, 9.0]])
        owner = torch.tensor([[0, 0, 0], [0, 1, 1]])
        prune(weight, owner, 0, 0.5)
        assert owner.tolist() == [[FREE, 0, 0], [FREE, 1, 1]]
        assert torch.equal(weight, torch.tensor([[0, -4.0, 3.0], [0, 0, 9.0]]))

    @pytest.mark.parametrize("method", [PackNet, PackNetNorms])
    def test_earlier_tasks_never_change_and_have_equal_shares(self, method):
        several = digits_problem(pairs(10))
        model = several.network(2).eval().to(memory_format=torch.channels_last)
        learner = method(several, model, SETTING, 0)
        kept = []
        for number, classes in enumerate(several.tasks[1:], 1):
            learner.prepare(several.stream(several.data.train.of(several.tasks[number - 1]), 1))
            kept.append(learner.answers(several.data.test, number - 1))
            learner.learn(classes, several.stream(several.data.train.of(classes), 2))
            for task, answer in enumerate(kept):
                assert torch.equal(learner.answers(several.data.test, task), answer)
        for owner in learner.owner:
            shares = owner.flatten().bincount(minlength=5) / owner.numel()
            assert float((shares - 0.2).abs().max()) < 0.02

    def test_the_first_task_may_keep_more(self, digits, base):
        learner, _ = learned(PackNet, digits, base, Divided(1e-2, first=1.3))
        for owner in learner.owner:
            assert float((owner == 0).float().mean()) == pytest.approx(0.65, abs=0.01)

    def test_the_first_tasks_part_is_trained_at_its_own_rate(self, digits, base):
        slow, fast = (
            learned(PackNet, digits, base, Divided(1e-2, old_rate=rate))[1]["0.weight"]
            for rate in (1e-9, 1e-2)
        )
        unpruned = base[0].weight.detach()
        assert torch.allclose(slow, torch.where(slow == 0, 0, unpruned))
        assert not torch.allclose(fast, torch.where(fast == 0, 0, unpruned))

    def test_norms_are_the_first_tasks_or_each_tasks_own(self, digits, base):
        for method, moved in ((PackNet, False), (PackNetNorms, True)):
            learner, prepared = learned(method, digits, base)
            assert ("1.running_mean" in changed(learner, prepared)) is moved


def test_tables_show_what_differs_from_the_plainest_setting():
    assert Setting(1e-3).shown(2) == "0.001"
    assert Setting(1e-3, 10.0).shown(2) == "0.001, penalty 10"
    assert Divided(3e-3).shown(2) == "0.003"
    other = Divided(1e-2, first=1.3, fresh=False)
    assert other.shown(2) == "0.01, old 0.003, the first keeps 65%, free ones keep weights"
    assert other.shown(5) == "0.01, old 0.003, free ones keep weights"


class TestOurs:
    def test_the_first_task_keeps_its_share_of_what_can_be_freed(self, digits, base):
        learner = Ours(digits, base, Divided(1e-2, first=1.2), 0)
        learner.prepare(digits.stream(digits.data.train.of(digits.tasks[0]), 1))
        learner.learn(digits.tasks[1], digits.stream(digits.data.train.of(digits.tasks[1]), 2))
        kept = learner.model.tasks["old"].slice
        assert [int(kept.mask(site).sum()) for site in ("0", "3")] == [8, 6]


class TestProblem:
    def test_streams_repeat_themselves(self, digits):
        runs = [[x for x, _ in digits.stream(digits.data.train, 5)] for _ in range(2)]
        assert torch.equal(torch.cat(runs[0]), torch.cat(runs[1]))

    def test_labels_become_places(self):
        assert local(torch.tensor([7, 5, 9]), (5, 7, 9)).tolist() == [1, 0, 2]

    @needs_mnist
    def test_no_run_trains_on_the_images_that_choose_its_setting(self):
        from bench.continual.problem import mnist_problem

        made = mnist_problem(halves(10))
        assert len(made.data.train) == 54_000
        seen = {row.numpy().tobytes() for row in made.data.train.pixels}
        repeated = sum(row.numpy().tobytes() in seen for row in made.data.validation.pixels)
        assert len(made.data.validation) == 6_000
        assert repeated < 10


def test_percentages_become_a_matrix_of_shares():
    matrix = extension.square([[90.0], [80.0, 70.0], [60.0, 65.0, 50.0]])
    assert matrix[2].tolist() == [0.6, 0.65, 0.5]
    assert extension.forgetting(matrix) == pytest.approx((0.3 + 0.05) / 2)
    assert extension.average_accuracy(matrix) == pytest.approx(1.75 / 3)


def test_a_network_without_norms_has_no_norms_per_task(digits):
    names = ("ours", "PackNet", "PackNet, norms per task")
    assert extension.applicable(names, digits) == list(names)
    plain = replace(digits, network=lambda outputs: nn.Linear(64, outputs))
    assert extension.applicable(names, plain) == ["ours", "PackNet"]


def test_a_nan_is_a_changed_answer():
    before = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    after = before.clone()
    after[1, 0] = torch.nan
    assert extension.same_bits(before, after) == pytest.approx(2 / 3)


def test_a_setting_is_judged_by_what_its_short_run_ends_with(digits, base, monkeypatch):
    monkeypatch.setattr(Problem, "base", lambda self, seed: base)
    setting = PackNet.settings[1]
    judged = extension.Study(digits, extension.Runs(None), 3).tried(PackNet, setting)
    short = digits.short(3)
    last = extension.measured(short, base, PackNet, setting, 0)["matrix"][-1]
    assert judged == pytest.approx(sum(last) / 2)


def test_a_finished_run_is_not_repeated(tmp_path, digits, base, monkeypatch):
    monkeypatch.setattr(Problem, "base", lambda self, seed: base)
    kept = tmp_path / "kept.json"
    short = replace(digits, longest=2)
    first = extension.Study(short, extension.Runs(kept), 2).run("new head only", 0)
    monkeypatch.setattr(extension, "measured", None)
    again = extension.Study(short, extension.Runs(kept), 2).run("new head only", 0)
    assert again == first


@pytest.mark.slow
@needs_mnist
def test_the_quick_study_compares_all_methods():
    found = quick("bench.extension")
    methods = set(extension.METHODS) - {"PackNet, norms per task"}
    for method in methods:
        assert {"old", "new", "acc", "forgetting"} <= found[f"mnist-2: {method}"].keys()
    for method in methods & set(extension.IN_A_ROW):
        assert {"acc", "unchanged"} <= found[f"mnist-5: {method}"].keys()
    assert found["mnist-2: ours"]["unchanged"] == found["mnist-5: ours"]["unchanged"] == 100
