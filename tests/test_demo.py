"""The demo as a user runs it, held to what it must reach; and its data."""

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from neusemslice import Profile, SemanticSlicing, data
from neusemslice.demo import shifted

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"


def run_demo(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "neusemslice", "demo", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder that the demo wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    result = run_demo(folder)
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stdout


@pytest.fixture(scope="module")
def outcome(finished):
    return json.loads((finished[0] / "outcome.json").read_text())


@pytest.mark.slow
class TestDemo:
    def test_the_model_is_good_before_maintenance(self, outcome):
        assert outcome["trained"] >= 0.97

    def test_restructuring(self, outcome):
        before, after = outcome["cost_before"], outcome["cost_after"]
        assert after["macs"] <= 0.5 * before["macs"]
        assert outcome["fine_tuning_epochs"] <= 2
        assert outcome["restructured"] >= outcome["trained"] - 0.02

    def test_readaptation(self, outcome):
        assert outcome["tuned_neurons"] <= 0.25
        assert outcome["shifted_full"] > outcome["shifted_before"] + 0.1
        assert outcome["regained"] >= 0.8
        assert outcome["untuned_identical"]
        assert outcome["tuned_bytes"] < 0.25 * outcome["full_bytes"]

    def test_extension(self, outcome):
        assert outcome["old_identical"]
        assert outcome["old_masked"] >= outcome["old_original"] - 0.03
        assert outcome["new"] >= 0.9

    def test_what_is_printed_is_what_was_measured(self, finished, outcome):
        _, printed = finished
        for key in ("trained", "restructured", "shifted_after", "old_masked", "new"):
            assert f"{outcome[key]:.1%}" in printed, key
        assert printed.count("yes") == 2

    def test_artefacts_can_be_read(self, finished):
        folder, _ = finished
        profile = Profile.load(folder / "profile.safetensors")
        slicing = SemanticSlicing.load(folder / "slice.safetensors")
        assert slicing.profile.graph == profile.graph
        for name in ("model", "restructured", "readapted", "extended"):
            with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
                assert list(file.keys())
        for figure in ("slicing.png", "outcome.png"):
            assert (folder / figure).stat().st_size > 10_000


class TestCommandLine:
    def test_missing_data_is_one_sentence(self, tmp_path):
        result = run_demo(tmp_path, "--data", str(tmp_path))
        assert result.returncode == 1
        assert "holds neither train-images-idx3-ubyte.gz nor" in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr


class TestShift:
    def test_is_the_same_each_time_and_keeps_shape(self):
        images = torch.rand(5, 1, 8, 8)
        assert torch.equal(shifted(images, 1), shifted(images, 1))
        assert not torch.equal(shifted(images, 1), shifted(images, 2))
        assert shifted(images, 1).shape == images.shape


class TestData:
    def test_digits(self):
        digits = data.load_digits()
        assert digits.train_images.shape == (1437, 1, 8, 8)
        assert digits.test_images.shape == (360, 1, 8, 8)
        assert digits.train_images.max() == 1
        assert set(digits.test_labels.tolist()) == set(range(10))

    def write(self, folder, images=6, labels=6, zipped=True):
        for kind, prefix in (("train", "train"), ("t10k", "t10k")):
            parts = {
                f"{prefix}-images-idx3-ubyte": (
                    struct.pack(">HBBIII", 0, 8, 3, images, 4, 3) + bytes(range(images * 12))
                ),
                f"{kind}-labels-idx1-ubyte": struct.pack(">HBBI", 0, 8, 1, labels) + bytes(labels),
            }
            for name, raw in parts.items():
                path = folder / (f"{name}.gz" if zipped else name)
                path.write_bytes(gzip.compress(raw) if zipped else raw)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_idx(self, tmp_path, zipped):
        self.write(tmp_path, zipped=zipped)
        read = data.load_mnist(tmp_path)
        assert read.train_images.shape == (6, 1, 4, 3)
        assert read.train_images[0, 0, 0, 1] == pytest.approx(1 / 255)
        assert read.test_labels.tolist() == [0] * 6

    def test_files_that_do_not_fit_together(self, tmp_path):
        self.write(tmp_path, images=6, labels=5)
        with pytest.raises(
            ValueError, match=r"train images \[6, 4, 3\] and labels \[5\] do not fit"
        ):
            data.load_mnist(tmp_path)

    @pytest.mark.parametrize(
        "raw", [b"", b"\x00\x00\x08", b"plain text, no idx", b"\0\0\x08\x03" * 4]
    )
    def test_what_is_not_idx(self, tmp_path, raw):
        self.write(tmp_path, zipped=False)
        (tmp_path / "train-images-idx3-ubyte").write_bytes(raw)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte is not an idx file"):
            data.load_mnist(tmp_path)

    def test_a_truncated_gzip(self, tmp_path):
        self.write(tmp_path)
        path = tmp_path / "t10k-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(ValueError, match=r"ubyte\.gz is not an idx file"):
            data.load_mnist(tmp_path)

    @pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not beside the project")
    def test_mnist(self):
        mnist = data.load_mnist(MNIST)
        assert mnist.train_images.shape == (60_000, 1, 28, 28)
        assert mnist.test_images.shape == (10_000, 1, 28, 28)
        assert mnist.train_labels.bincount().tolist() == [
            5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
        ]  # fmt: skip
