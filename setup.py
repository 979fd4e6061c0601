"""Builds the one extension, ``neusemslice._C``: kernels, dispatcher registrations, bindings.

CPU kernels are always built. CUDA kernels are built when torch was built with CUDA and a
toolkit is found (``CUDA_HOME``), whether or not a GPU is visible. Two switches override that:
``NSS_NO_CUDA=1`` builds for the CPU only, ``NSS_FORCE_CUDA=1`` refuses to build without CUDA.
What was decided is printed, compiled into ``_C.build_info()``, and written beside the extension
as ``_C_build.json`` so that an extension that fails to load can still say what it was built for.
"""

import json
import os
import platform
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        "neusemslice: torch is needed to build the extension and cannot be imported "
        f"({error}). Install torch>=2.11 first, then install with --no-build-isolation."
    )

ROOT = Path(__file__).parent.resolve()
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Debug symbols, which Python's own flags ask for, would be most of the library and of its linking.
CXX_FLAGS += ["-g0"]
# Fused multiply-adds only where the source asks for one: results then have the same bits whichever
# instruction set a kernel uses. The vector types never cross a library's boundary (-Wno-psabi).
CXX_FLAGS += ["-ffp-contract=off", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]


def switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        sys.exit(f"neusemslice: {name} must be 0 or 1, got {value!r}.")
    return value == "1"


def choose_cuda() -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why."""
    refuse, force = switch("NSS_NO_CUDA"), switch("NSS_FORCE_CUDA")
    if refuse and force:
        sys.exit("neusemslice: NSS_NO_CUDA=1 and NSS_FORCE_CUDA=1 contradict each other.")
    if refuse:
        return False, "NSS_NO_CUDA=1"
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} was built without CUDA")
    if cpp_extension.CUDA_HOME is None:
        missing.append("no CUDA toolkit was found (CUDA_HOME)")
    if not missing:
        return True, f"torch has CUDA {torch.version.cuda}, toolkit at {cpp_extension.CUDA_HOME}"
    why = " and ".join(missing)
    if force:
        sys.exit(f"neusemslice: NSS_FORCE_CUDA=1, but {why}.")
    return False, why


class BuildExtension(cpp_extension.BuildExtension):
    """Keeps object files in one place and writes the build's description beside the result."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable install otherwise compiles in a new temporary folder each time, so that
        # nothing would ever be found up to date.
        tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        self.build_temp = str(ROOT / "build" / tag)

    def run(self) -> None:
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        super().run()
        target = Path(self.get_ext_fullpath("neusemslice._C")).parent / "_C_build.json"
        target.write_text(json.dumps(BUILD, indent=2) + "\n")


with_cuda, reason = choose_cuda()
BUILD = {
    "torch": torch.__version__,
    "python": platform.python_version(),
    "platform": f"{platform.system()} {platform.machine()}",
    "cuda": torch.version.cuda if with_cuda else None,
    "cuda_reason": reason,
    "NSS_NO_CUDA": os.environ.get("NSS_NO_CUDA", "0"),
    "NSS_FORCE_CUDA": os.environ.get("NSS_FORCE_CUDA", "0"),
}
for key, value in BUILD.items():
    print(f"neusemslice build: {key} = {value}")

sources = ["csrc/module.cpp"]
sources += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/ops/*.cpp"))
sources += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/ops/cpu/*.cpp"))
# What is made of torch's operators needs no CUDA to build; without a GPU, tests run it on the CPU.
sources += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/ops/cuda/*.cpp"))
if with_cuda:
    sources += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/ops/cuda/*.cu"))

macros = [
    # Written to the build folder only once a macro changes, so ninja rebuilds just then.
    ("NSS_BUILD_JSON", json.dumps(json.dumps(BUILD))),
]
info_header = ROOT / "build" / "generated" / "neusemslice_build_info.h"
info_header.parent.mkdir(parents=True, exist_ok=True)
text = "".join(f"#define {name} {value}\n" for name, value in macros)
if not info_header.exists() or info_header.read_text() != text:
    info_header.write_text(text)

extension_class = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
compile_args: object = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS} if with_cuda else CXX_FLAGS
setup(
    ext_modules=[
        extension_class(
            name="neusemslice._C",
            sources=sources,
            include_dirs=[str(ROOT / "csrc"), str(info_header.parent)],
            extra_compile_args=compile_args,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
