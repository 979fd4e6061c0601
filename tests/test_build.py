"""What the build was told, says of itself, and says when it cannot be loaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neusemslice import _C, _extension

ROOT = Path(__file__).parent.parent


def run_setup(**switches: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | switches,
        capture_output=True,
        text=True,
        check=False,
    )


class TestSwitches:
    def test_build_info_repeats_every_switch(self):
        info = _C.build_info()
        assert info["torch"] == torch.__version__
        assert info["NSS_NO_CUDA"] in ("0", "1")
        assert info["NSS_FORCE_CUDA"] in ("0", "1")
        assert info["cuda"] is None or info["cuda"] == torch.version.cuda
        assert info["cxx_standard"] >= 202002
        assert info["compiler"].split()[0] in ("gcc", "clang")

    @pytest.mark.skipif(torch.version.cuda is not None, reason="torch was built with CUDA")
    def test_forcing_cuda_on_a_cpu_torch_fails_with_a_sentence(self):
        result = run_setup(NSS_FORCE_CUDA="1")
        assert result.returncode != 0
        assert f"NSS_FORCE_CUDA=1, but torch {torch.__version__} was built without CUDA" in (
            result.stderr
        )
        assert "Traceback" not in result.stderr

    def test_contradicting_and_unknown_values(self):
        both = run_setup(NSS_FORCE_CUDA="1", NSS_NO_CUDA="1")
        assert both.returncode != 0
        assert "contradict" in both.stderr
        odd = run_setup(NSS_NO_CUDA="yes")
        assert odd.returncode != 0
        assert "NSS_NO_CUDA must be 0 or 1, got 'yes'" in odd.stderr


class TestFailedImport:
    @pytest.fixture
    def copied(self, tmp_path):
        """The package without its extension, importable from another folder."""
        package = tmp_path / "neusemslice"
        shutil.copytree(
            Path(_extension.__file__).parent,
            package,
            ignore=shutil.ignore_patterns("_C*", "__pycache__"),
        )
        return package

    def import_in(self, package: Path) -> str:
        # -S leaves out the .pth files, by which an editable install would find its own extension.
        result = subprocess.run(
            [sys.executable, "-S", "-c", "import neusemslice"],
            cwd=package.parent,
            env=os.environ | {"PYTHONPATH": f".{os.pathsep}{Path(torch.__file__).parent.parent}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode != 0
        return result.stderr.splitlines()[-1]

    def test_no_extension(self, copied):
        message = self.import_in(copied)
        assert "no compiled extension lies in" in message
        assert f"found: torch {torch.__version__}" in message

    def test_one_that_does_not_load(self, copied):
        suffix = Path(_C.__file__).name.removeprefix("_C")
        (copied / f"_C{suffix}").write_bytes(b"not a shared object")
        (copied / "_C_build.json").write_text('{"torch": "1.0", "python": "3.0"}')
        message = self.import_in(copied)
        assert "was built for torch 1.0, Python 3.0" in message
        assert f"was found with torch {torch.__version__}" in message
