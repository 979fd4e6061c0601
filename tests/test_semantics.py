"""Components and class groups mean something, on real networks and real images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neusemslice as nss
from bench import cifar, mnist
from bench.semantics import VEHICLES, ablation, agreement, split_p_value
from bench.subjects import Answers, Subject, cifar_subject, mnist_subject

needs_mnist = pytest.mark.skipif(mnist.missing() is not None, reason=str(mnist.missing()))
needs_cifar = pytest.mark.skipif(cifar.missing() is not None, reason=str(cifar.missing()))


@pytest.fixture(scope="module")
def digits() -> Subject:
    return mnist_subject(1000)


@pytest.fixture(scope="module")
def photos() -> Subject:
    return cifar_subject(200)


def sliced(subject: Subject, metric: str, images: int, part: int = 0) -> nss.SemanticSlicing:
    batches = subject.subset(part, images)
    profile = nss.profile(subject.model, batches, (metric,), class_names=subject.classes)
    return nss.slice(profile, metric, 0.9)


@needs_mnist
@pytest.mark.slow
def test_a_component_matters_to_its_own_classes(digits, tmp_path):
    lost = ablation(digits, sliced(digits, "taylor", 1500), Answers(tmp_path / "answers.json"))
    assert lost.own > 5 * max(lost.others, lost.random, 0.01)


@needs_mnist
@pytest.mark.slow
def test_merged_slices_answer_with_fewer_neurons(digits):
    slicing = sliced(digits, "taylor", 1500)
    merged, union = slicing.merged_slice(digits.model), slicing.critical_slice()
    assert len(merged) < len(union)
    assert float(digits.right(merged).float().mean()) > 0.9


@needs_cifar
@pytest.mark.slow
def test_animals_are_unlike_vehicles(photos):
    slicing = sliced(photos, "avg", 1000)
    vehicles = [k for k, name in enumerate(cifar.CLASSES) if name in VEHICLES]
    assert split_p_value(slicing.class_similarity, vehicles) < 0.01
    groups = slicing.class_groups
    assert groups[cifar.CLASSES.index("cat")] == groups[cifar.CLASSES.index("dog")]
    assert not set(groups[vehicles].tolist()) & set(
        groups[[k for k in range(10) if k not in vehicles]].tolist()
    )


@needs_cifar
@pytest.mark.slow
def test_components_are_those_of_the_other_half(photos):
    one, other = (sliced(photos, "avg", 1000, part) for part in (0, 1))
    assert agreement(one, other) > 0.3


class TestSplits:
    def test_by_hand(self):
        alike = torch.eye(4)
        alike[0, 1] = alike[1, 0] = alike[2, 3] = alike[3, 2] = 0.9
        # A split into pairs and its reflection are both counted: 2 of 6.
        assert split_p_value(alike, [0, 1]) == pytest.approx(2 / 6)
        assert split_p_value(alike, [0, 2]) == 1.0
        assert split_p_value(alike, [3]) == 1.0

    @given(st.integers(0, 10**6), st.integers(1, 5))
    def test_is_a_share(self, seed, size):
        generator = torch.Generator().manual_seed(seed)
        alike = torch.rand(6, 6, generator=generator)
        p = split_p_value(alike + alike.t(), range(size))
        assert 0 < p <= 1


@needs_mnist
def test_answers_are_kept(digits, tmp_path, monkeypatch):
    slicing = sliced(digits, "avg", 250)
    kept = slicing.merged_slice(digits.model)
    path = tmp_path / "deep" / "answers.json"
    found = Answers(path).of(digits, kept)
    monkeypatch.setattr(Subject, "right", lambda *_: pytest.fail("measured twice"))
    assert torch.equal(Answers(path).of(digits, kept), found)
    assert digits.of_class(3).labels.unique().tolist() == [3]
