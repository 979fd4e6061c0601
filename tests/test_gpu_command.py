"""``python -m bench.gpu`` as far as a machine without a GPU can tell."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import each_op, gpu, gram, harness, masked_optim, report, rows, sanitizer, stages
from bench.device import ENOUGH, LONG, Replays
from bench.stages import Ended, Outcome, Stage

MEMCHECK = """========= COMPUTE-SANITIZER
starting
========= Invalid __global__ read of size 4 bytes
=========     at void neusemslice::cuda::rows_kernel<float, (unsigned int)31>(Sites)+0x1b0
=========     by thread (32,0,0) in block (1,0,0)
=========     Access at 0x7f5c0a000200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f5c0a000000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame:main in nss.cpp:61 [0x1a2b]
=========
========= Program hit invalid argument (error 1) on CUDA API call to cudaPointerGetAttributes.
=========     Saved host backtrace up to driver entry point at error
=========
{"calls": 3}
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at 0x90 in chunks_kernel.cuh:72
=========     and Read access at 0x120 in neusemslice::cuda::chunks_kernel(SortedBatch, Sites)
=========     and Read access at 0x190 in neusemslice::cuda::chunks_kernel(SortedBatch, Sites)
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\n{}\n========= ERROR SUMMARY: 0 errors\n"
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section
=========
"""


class TestSanitizer:
    def test_reports_are_counted_by_whose_kernel_they_name(self):
        found = sanitizer.findings(MEMCHECK)
        assert (found.ours, found.others) == (1, 1)
        assert found.first.startswith("Invalid __global__ read of size 4 bytes at void neusemslice")

    def test_races(self):
        found = sanitizer.findings(RACECHECK)
        assert (found.ours, found.others) == (1, 0)
        assert "Race reported between Write access" in found.first

    def test_nothing_found(self):
        assert sanitizer.findings(CLEAN) == sanitizer.Findings()

    @pytest.mark.parametrize(
        ("log", "message"),
        [(REFUSED, "come to its end: Error: Device not supported"), ("", "it said nothing")],
    )
    def test_a_tool_that_did_not_run_is_no_success(self, log, message):
        with pytest.raises(ValueError, match=message):
            sanitizer.findings(log)

    def test_arguments(self, capsys):
        assert sanitizer.main([]) == 2
        assert sanitizer.main(["leakcheck"]) == 2
        assert "name some of memcheck, racecheck, synccheck" in capsys.readouterr().out

    def test_it_runs_the_operators_and_writes_what_it_found(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(report, "RESULTS", tmp_path)
        monkeypatch.setattr(sanitizer, "LOGS", tmp_path / "logs")
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\necho $* >{tmp_path}/called\ncat <<'EOF'\n{MEMCHECK}EOF\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        assert sanitizer.main(["memcheck"]) == 1
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"memcheck": 1}
        assert (tmp_path / "called").read_text().startswith("--tool memcheck")
        assert (tmp_path / "called").read_text().strip().endswith("-m bench.each_op")
        assert "Invalid __global__ read" in next(tmp_path.glob("*.md")).read_text()


class TestEachOp:
    def test_every_operator_is_called(self):
        registered = {
            schema.name.removeprefix("neusemslice::")
            for schema in torch._C._jit_get_all_schemas()
            if schema.name.startswith("neusemslice::")
        }
        assert {call.op for call in each_op.calls()} == registered

    def test_calls_are_repeatable(self):
        for call in each_op.calls():
            first, second = (call.prepare(torch.device("cpu"))() for _ in range(2))
            assert first, call.name
            assert all(map(torch.equal, first, second)), call.name


class Time:
    """A clock that stages move on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run_stages(made, ends, budget=100.0):
    """Outcomes of stages, of which each takes (seconds, exit status, output) of `ends`."""
    time, told, limits = Time(), [], {}

    def execute(command, env, limit, log):
        seconds, status, output = ends[command[0]]
        limits[command[0]] = limit
        time.now += min(seconds, limit)
        return Ended(None if seconds > limit else status, output)

    stages.run(made, budget, Path(), lambda o: told.append(list(o)), execute=execute, clock=time)
    assert [len(o) for o in told] == list(range(1, len(made) + 1)), "told after each stage"
    return told[-1] if told else [], limits


class TestStages:
    def test_what_fails_or_overruns_does_not_stop_the_rest(self):
        made = [Stage(name, (name,), 20) for name in ("good", "bad", "slow", "last")]
        made.insert(1, Stage("absent", ("absent",), 20, skip="there is no nvcc"))
        ends = {
            "good": (3, 0, "built\n\n"),
            "bad": (1, 3, "a\nError: b\n"),
            "slow": (99, 0, ""),
            "last": (2, 0, '{"x": 1}'),
        }
        outcomes, _ = run_stages(made, ends)
        assert outcomes == [
            Outcome("good", "done", 3, "built"),
            Outcome("absent", "skipped", 0, "there is no nvcc"),
            Outcome("bad", "failed", 1, "exit status 3: Error: b"),
            Outcome("slow", "overran", 20, "ended after 20 s; last: it printed nothing"),
            Outcome("last", "done", 2, '{"x": 1}'),
        ]

    def test_without_the_build_nothing_else_is_tried(self):
        made = [Stage("build", ("build",), 20, needed=True), Stage("tests", ("tests",), 20)]
        outcomes, _ = run_stages(made, {"build": (1, 1, "no compiler")})
        assert outcomes[1] == Outcome("tests", "skipped", 0, "it needs what build did not do")

    def test_the_budget_bounds_all_together(self):
        made = [Stage(name, (name,), 60) for name in "abc"]
        outcomes, limits = run_stages(made, {"a": (55, 0, ""), "b": (99, 0, "")}, budget=100)
        assert limits == {"a": 60, "b": 45}
        assert [o.status for o in outcomes] == ["done", "overran", "skipped"]
        assert outcomes[2].says == "no time was left"

    def test_a_process_that_overruns_is_ended_with_its_children(self, tmp_path):
        code = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
        ended = stages.execute((sys.executable, "-c", code), {}, 1.0, tmp_path / "logs" / "a.log")
        assert ended == Ended(None, "begun\n")

    def test_a_process_gets_its_variables(self, tmp_path):
        code = "import os, sys; print(os.environ['NSS_X']); sys.exit(4)"
        ended = stages.execute((sys.executable, "-c", code), {"NSS_X": "y"}, 30, tmp_path / "a.log")
        assert ended == Ended(4, "y\n")


class TestCommand:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_says_so(self, capsys):
        assert gpu.main([]) == 2
        assert "no CUDA device is visible" in capsys.readouterr().out

    def test_arguments(self):
        with pytest.raises(SystemExit):
            gpu.main(["--fast"])

    def test_the_stages_fit_each_other(self):
        made = gpu.stages()
        assert made[0].name == "build"
        assert len({stage.name for stage in made}) == len(made)
        assert all(stage.limit < gpu.BUDGET for stage in made)
        assert gpu.BUDGET < 9 * 60
        for stage in made:
            assert stage.command[0] == sys.executable

    def test_results_are_written_after_each_stage(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(report, "RESULTS", tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        properties = SimpleNamespace(
            name="NVIDIA H200", total_memory=140 * 2**30, multi_processor_count=132
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(report, "driver", lambda: "580.159.03")
        monkeypatch.chdir(tmp_path)

        def instead(made, budget, logs, told):
            outcomes = [Outcome(made[0].name, "done", 61.5, "a | b")]
            told(outcomes)
            outcomes.append(Outcome("tests", "failed", 3.0, "exit status 1: 2 failed"))
            told(outcomes)
            return outcomes

        monkeypatch.setattr(gpu, "run", instead)
        monkeypatch.setenv("NSS_COMMIT", "")
        assert gpu.main(["--commit", "abc123"]) == 1
        text = (tmp_path / "nvidia-h200.md").read_text()
        assert "# NVIDIA H200, 140 GiB, driver 580.159.03, CUDA 13.0" in text
        assert "commit abc123" in text
        assert "| build | done | 61.50 | a / b |" in text
        assert "| tests | failed | 3.00 | exit status 1: 2 failed |" in text
        about = json.loads((tmp_path / "nvidia-h200.json").read_text())["machine"]
        assert about["driver"] == "580.159.03"
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
            "build": "done",
            "tests": "failed",
        }


class FakeGpu:
    """Counts what is done with it; each replay takes the time that its run is given."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.warmed = self.captured = 0
        self.timed = []

    def warm_up(self, run):
        self.warmed += 1
        run()

    def capture(self, run):
        self.captured += 1
        run()
        return run

    def time(self, runs):
        times = []
        for run in runs:
            run()
            times.append(next(self.seconds))
        self.timed.append(len(runs))
        return times


class TestTiming:
    def replays(self, seconds, **options):
        seen = []
        fake = FakeGpu(iter(seconds))
        replays = Replays(seen.append, gpu=fake, **options)
        seen.clear()
        return replays, fake, seen

    def test_short_calls_are_replayed_often_and_their_median_counts(self):
        replays, fake, seen = self.replays([1e-5, *[1e-5] * 26, *[9.0] * 24])
        assert replays.seconds(start=1) == 1e-5
        assert fake.timed == [1, 50]
        assert seen[:5] == [1, 1, 2, 0, 1], "buffers in turn"
        assert (fake.warmed, fake.captured) == (3, 3)

    def test_calls_of_some_length_a_few_times(self):
        replays, fake, _ = self.replays([ENOUGH / 2] * 9, buffers=1)
        assert replays.seconds() == ENOUGH / 2
        assert fake.timed == [1, 4]

    def test_long_calls_once(self):
        replays, fake, _ = self.replays([LONG * 2], buffers=1)
        assert replays.seconds() == LONG * 2
        assert fake.timed == [1]

    def test_what_waits_for_the_device_is_not_captured(self):
        replays, fake, _ = self.replays([LONG * 2], captured=False)
        replays.seconds()
        assert fake.captured == 0


class ProcessorAsGpu:
    """Runs at once what a GPU would replay."""

    def warm_up(self, run):
        run()

    def capture(self, run):
        run()
        return run

    def time(self, runs):
        times = []
        for run in runs:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return times


class TestBenchmarks:
    """Benchmarks with sizes of their own for a GPU, small ones, on the path that a GPU takes."""

    @pytest.fixture(autouse=True)
    def _as_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr("bench.device.GPU", ProcessorAsGpu())
        monkeypatch.setattr("bench.device.ENOUGH", 1e-4)
        monkeypatch.setattr(harness, "ON_GPU", True)
        monkeypatch.setattr(harness, "CACHE_BYTES", 1024)

    def test_gram(self):
        found = gram.measure("x", 300, 40, rounds=2, patience=0).values
        assert {"ms", "limit", "vs_float64", "vs_float32"} == found.keys()

    @pytest.mark.parametrize("groups", [1, 2])
    def test_rows(self, groups):
        found = rows.measure("x", rows.Layer(4, 8, 8, 6, groups), 0.5, rounds=2, patience=0).values
        assert {"ms", "limit", "vs_whole"} <= found.keys()

    @pytest.mark.parametrize("share", masked_optim.SHARES)
    @pytest.mark.parametrize("kind", masked_optim.KINDS)
    def test_masked_optim(self, kind, share):
        (count, _), kind = masked_optim.GPU_SIZES["8 × 8192²"], masked_optim.KINDS[kind]
        operator, step = (
            harness.measure(workload, rounds=2, patience=0).values
            for workload in masked_optim.workloads("x", kind, count, 32, share, rotated=1)
        )
        assert {"ms", "limit"} <= operator.keys()
        assert {"ms", "vs_hook", "vs_correct", "vs_fused"} <= step.keys()
