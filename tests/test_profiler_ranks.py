"""Several processes profile as one would: whole, wrapped and sharded models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import Mlp, Residual, images, loader, settled
from ranks import on_ranks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import neusemslice as nss
from neusemslice.graph import Inputs, evaluation, fingerprint, trace
from neusemslice.profiling import METRICS, sweep

IMAGES = loader(24)
VECTORS = loader(24, shape=(12,))


def mlp():
    torch.manual_seed(0)
    return settled(Mlp(), 12)


def residual():
    torch.manual_seed(0)
    model = settled(Residual(), 1, 8, 8)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def sharded():
    """The residual network, its parameters spread over all ranks: some layers, then the rest."""
    model = residual()
    for layer in (model.conv1, model.bn1, model.inner):
        fully_shard(layer)
    return fully_shard(model)


def assert_close(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[name], rtol=1e-5, atol=1e-6)


def assert_same_bits(a, b):
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def saved(folder, world):
    return [nss.Profile.load(folder / f"{rank}.safetensors") for rank in range(world)]


def _whole(rank, world, folder):
    # Ragged: ranks see different numbers of samples, and of batches.
    profile = nss.profile(mlp(), VECTORS[rank::world], METRICS)
    profile.all_reduce()
    profile.save(folder / f"{rank}.safetensors")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_equal_one_process(world, tmp_path):
    on_ranks(world, _whole, tmp_path, tmp_path)
    profiles = saved(tmp_path, world)
    assert_close(profiles[0], nss.profile(mlp(), VECTORS, METRICS))
    for other in profiles[1:]:
        assert_same_bits(profiles[0], other)


def _differing(rank, world):
    profile = nss.profile(mlp(), VECTORS, ("avg",), sites=["first"] if rank else None)
    before = copy.deepcopy(profile)
    with pytest.raises(ValueError, match=r"all_reduce: the profiles differ in their sites: \["):
        profile.all_reduce()
    assert_same_bits(profile, before)


def test_ranks_with_different_profiles_are_refused(tmp_path):
    on_ranks(2, _differing, tmp_path)


def _wrapped(rank, world, folder):
    wrapped = DistributedDataParallel(residual())
    # One rank has three times as many batches: the wrapper's own collectives would not end.
    share = IMAGES[:3] if rank == 0 else IMAGES[3:]
    profile = nss.profile(wrapped, share)
    profile.all_reduce()
    profile.save(folder / f"{rank}.safetensors")
    own = nss.Profiler(wrapped, IMAGES[0][0][:2])
    with own.batch(IMAGES[0][1]):
        wrapped(IMAGES[0][0])
    assert own.graph == profile.graph


def test_a_data_parallel_model_is_profiled_as_the_model_in_it(tmp_path):
    on_ranks(2, _wrapped, tmp_path, tmp_path)
    expected = nss.profile(residual(), IMAGES)
    for profile in saved(tmp_path, 2):
        assert profile.graph == expected.graph
        assert_close(profile, expected)


def _sharded(rank, world, folder):
    model, plain = sharded(), residual()
    # What a trace concludes from its inputs must not differ between ranks.
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    graph = trace(model, Inputs((images(2 + rank, 1, 8, 8, seed=rank),)))
    handle.remove()
    assert all(torch.equal(x, images(2, 1, 8, 8, seed=0)) for x in seen)
    assert graph == trace(plain, Inputs((images(2, 1, 8, 8),)))
    assert fingerprint(model) == fingerprint(plain)
    with evaluation(model, requires_grad=True):
        model(IMAGES[0][0])
    assert_trains_the_same(model, plain)
    with torch.no_grad():
        model(IMAGES[0][0])  # leaves whole parameters in the model
    profile = nss.profile(model, IMAGES[rank::world], ("avg", "var", "taylor"))
    assert_trains_the_same(model, plain)
    with pytest.raises(NotImplementedError, match=r"deeplift: the parameters of .* spread over"):
        nss.profile(model, IMAGES[:1], ("deeplift",))
    assert_trains_the_same(model, plain)
    profile.all_reduce()
    profile.save(folder / f"{rank}.safetensors")


def assert_trains_the_same(model, plain):
    """Parameters' flags are those of the plain model, at rest and when they are whole."""
    wanted = {name for name, p in plain.named_parameters() if p.requires_grad}
    F.cross_entropy(model(IMAGES[0][0]), IMAGES[0][1]).backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert {name for name, p in model.named_parameters() if p.grad is not None} == wanted
    model.zero_grad()


def test_a_sharded_model_equals_the_whole_one(tmp_path):
    on_ranks(2, _sharded, tmp_path, tmp_path)
    expected = nss.profile(residual(), IMAGES, ("avg", "var", "taylor"))
    for profile in saved(tmp_path, 2):
        assert_close(profile, expected)


class StoppedError(Exception):
    pass


def _stopped_and_continued(rank, world, folder):
    model, share = sharded(), IMAGES[rank::world]
    expected = nss.profile(model, share)
    path = folder / f"checkpoint-{rank}"
    sweep.CHECKPOINT_SECONDS = 0.0
    save = sweep._save

    def stopping(path, found, batches):
        # The second rank is killed before its second checkpoint, the first after it.
        if batches == 1 or rank == 0:
            save(path, found, batches)
        if batches == 2:
            raise StoppedError

    sweep._save = stopping
    with pytest.raises(StoppedError):
        nss.profile(model, share, checkpoint=path)
    sweep._save = save
    assert_same_bits(nss.profile(model, share, checkpoint=path), expected)
    assert not path.exists()


def test_a_sharded_sweep_continues_although_ranks_stopped_at_different_batches(tmp_path):
    on_ranks(2, _stopped_and_continued, tmp_path, tmp_path)
