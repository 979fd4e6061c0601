"""No operator waits for the device: nothing in its sources reads a value back.

On a GPU, test_cuda_streams.py has the driver say so of each call.
"""

import re
from pathlib import Path

import pytest

from bench.each_op import calls

ROOT = Path(__file__).parents[2]
# What copies to the host or gives a result whose size is data; of the latter, `waits` tells.
READS_BACK = re.compile(
    r"\.(item|cpu|tolist|numpy)\b(<\w+>)?\(|cudaMemcpy|cuda\w*Synchronize|kCPU|\.equal\("
    r"|(at::|\.|torch\.)(is_nonzero|equal|unique\w*|repeat_interleave)\("
)
SIZE_IS_DATA = re.compile(r"(at::|\.|torch\.)(nonzero|masked_select)\(")
SOURCES = sorted(
    path
    for folder, pattern in (
        ("csrc/ops", "*.[ch]*"),
        ("csrc/ops/cuda", "*.*"),
        ("neusemslice/ops", "*.py"),
    )
    for path in (ROOT / folder).glob(pattern)
)


def lines(path: Path, pattern: re.Pattern[str]) -> list[str]:
    """Those that match, without comments."""
    code = (re.split(r"//|  # ", line)[0] for line in path.read_text().splitlines())
    return [line.strip() for line in code if pattern.search(line)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_reads_back(path: Path) -> None:
    assert lines(path, READS_BACK) == []


def test_only_edges_wait_for_how_many_they_are() -> None:
    sizing = [path.name for path in SOURCES if lines(path, SIZE_IS_DATA)]
    assert sizing == ["similarity_kernel.cu"]
    assert {call.op for call in calls() if call.waits} == {
        "bitset_similarity_edges",
        "pairwise_similarity_edges",
    }


@pytest.mark.parametrize(
    "line",
    [
        "const auto n = count.item<int64_t>();",
        "rows.cpu().contiguous()",
        "cudaMemcpyAsync(a, b, n, kind, stream);",
        "C10_CUDA_CHECK(cudaStreamSynchronize(stream));",
        "x.to(at::kCPU)",
        "if at::equal(a, b)",
    ],
)
def test_what_reads_back_is_noticed(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.cu"
    path.write_text(f"// x.item()\n  {line}  // so\n")
    assert len(lines(path, READS_BACK)) == 1
