"""Files are written whole or not at all, and what is wrong with one is said."""

import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

import neusemslice
from neusemslice import _files

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1], dtype=torch.int64)}


def load(path, kind="thing"):
    return _files.read(path, kind, lambda tensors, content: (tensors, content))


@pytest.fixture
def written(tmp_path):
    return _files.write(tmp_path / "x" / "file.safetensors", "thing", TENSORS, {"k": [1, "ü"]})


def test_round_trip(written):
    tensors, content = load(written)
    assert content == {"k": [1, "ü"]}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, TENSORS[name])


def test_views_and_gradients_are_written_as_plain_tensors(tmp_path):
    wide = torch.arange(12.0, requires_grad=True)
    path = _files.write(tmp_path / "f", "thing", {"every second": wide[::2], "all": wide}, {})
    tensors, _ = load(path)
    assert tensors["every second"].tolist() == [0, 2, 4, 6, 8, 10]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(written, monkeypatch):
    before = written.read_bytes()

    def broken(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space left"):
        _files.write(written, "thing", {}, {})
    assert written.read_bytes() == before
    assert [p.name for p in written.parent.iterdir()] == [written.name]


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such file"):
        load(tmp_path / "gone")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated(written, keep):
    written.write_bytes(written.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load(written)


def test_another_kind(written):
    with pytest.raises(ValueError, match="holds a thing, expected a slice"):
        load(written, "slice")


def test_another_version(written, monkeypatch):
    monkeypatch.setattr(_files, "FORMAT", 7)
    with pytest.raises(ValueError, match=r"is of format \d, this version reads 7"):
        load(written)


def test_somebody_elses_safetensors(tmp_path):
    path = tmp_path / "other"
    path.write_bytes(save(TENSORS))
    with pytest.raises(ValueError, match="none of neusemslice's"):
        load(path)


@pytest.mark.parametrize("metadata", ["{", "[]", "{}", '{"kind": "thing", "format": 2}'])
def test_damaged_metadata(tmp_path, metadata):
    path = tmp_path / "bad"
    path.write_bytes(save(TENSORS, {"neusemslice": metadata}))
    with pytest.raises(ValueError, match="damaged"):
        load(path)


def test_a_builder_that_misses_something_names_the_file(written):
    with pytest.raises(ValueError, match=r"file\.safetensors is damaged: 'c'"):
        _files.read(written, "thing", lambda tensors, content: tensors["c"])


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_the_files_name(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("fuzz") / "fuzzed"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="fuzzed is"):
        load(path)


@given(st.integers(0, 400), st.integers(0, 255))
def test_any_changed_byte_of_the_header_is_survived(tmp_path_factory, at, value):
    folder = tmp_path_factory.mktemp("flip")
    path = _files.write(folder / "flipped", "thing", TENSORS, {"k": 1})
    raw = bytearray(path.read_bytes())
    raw[at % (8 + struct.unpack("<Q", raw[:8])[0])] = value
    path.write_bytes(raw)
    said = ""
    try:
        load(path)  # a changed letter of a tensor's name makes another whole file
    except ValueError as error:
        said = str(error)
    assert not said or "flipped" in said


def test_nothing_in_the_package_reads_or_writes_pickles():
    sources = Path(neusemslice.__file__).parent.rglob("*.py")
    calls = re.compile(r"\b(import pickle|pickle\.|torch\.load\(|torch\.save\()")
    assert [path.name for path in sources if calls.search(path.read_text())] == []


def test_metadata_is_json_with_versions(written):
    from safetensors import safe_open

    with safe_open(written, framework="pt") as file:
        head = json.loads(file.metadata()["neusemslice"])
    assert head["torch"] == torch.__version__
    assert head["format"] == _files.FORMAT
