"""What the benchmarks read of the compiler's report on kernels."""

import pytest

from bench import registers
from bench.registers import Usage

LOG = """ptxas info    : 3 bytes gmem
ptxas info    : Compiling entry function '_ZN11neusemslice4cuda11rows_kernelIfLj31EEEvNS0_5SitesE' \
for 'sm_80'
ptxas info    : Function properties for _ZN11neusemslice4cuda11rows_kernelIfLj31EEEvNS0_5SitesE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 120 registers, used 1 barriers
ptxas info    : Compiling entry function '_ZN11neusemslice4cuda11rows_kernelIfLj31EEEvNS0_5SitesE' \
for 'sm_90'
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 114 registers, used 1 barriers, 8 bytes cumulative stack size, 11264 bytes smem
ptxas info    : Compile time = 171.110 ms
ptxas info    : Compiling entry function 'plain_kernel' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers
""".replace(" \\\n", " ")


def test_reads_the_kernels_of_one_architecture():
    rows, plain = registers.usages(LOG, "sm_90")
    name = "_ZN11neusemslice4cuda11rows_kernelIfLj31EEEvNS0_5SitesE"
    assert rows == Usage(name, registers=114, spills=32, stack=8, shared=11264)
    assert plain == Usage("plain_kernel", registers=14, spills=0, stack=0, shared=0)


def test_names_are_short():
    demangled = "void neusemslice::cuda::rows_kernel<neusemslice::BFloat16, 31u>(neusemslice::Site)"
    assert registers._short(demangled) == "rows_kernel<BFloat16, 31u>"
    inner = "neusemslice::ops::(anonymous namespace)::pack_kernel(bool const*, long)"
    assert registers._short(inner) == "pack_kernel"


def test_refuses_a_log_that_says_too_little():
    with pytest.raises(ValueError, match="does not say what plain_kernel uses"):
        registers.usages("Compiling entry function 'plain_kernel' for 'sm_90'", "sm_90")


def test_a_builds_log_is_read_source_by_source():
    built = (
        "[1/3] g++ -c /x/csrc/ops/similarity.cpp -o s.o\n"
        "[2/3] /usr/bin/nvcc -O3 -c -c /x/csrc/ops/cuda/class_stats_kernel.cu -o c.o -O3\n" + LOG
    )
    assert registers.by_source(built + "[3/3] nvcc -c /x/empty.cu -o e.o\n").keys() == {
        "class_stats_kernel"
    }
    found = registers.section(registers.by_source(built), "sm_90")
    assert len(found.results) == 2
    assert all(result.name.startswith("class_stats_kernel: ") for result in found.results)


def test_without_logs_it_says_what_to_build(tmp_path, capsys):
    assert registers.main([str(tmp_path)]) == 1
    assert "build the target cuda_check first" in capsys.readouterr().out


def test_a_log_without_kernels():
    assert registers.usages("ptxas info    : 0 bytes gmem\n", "sm_90") == []
