// The Python module `neusemslice._C`. Importing it loads the shared object, whose static
// initialisers register the operators with the dispatcher; Python then calls them as
// torch.ops.neusemslice.*, which torch.compile can trace and a pybind11 function is not.
//
// The only file that includes torch/extension.h, which takes half a minute to compile.

#include <torch/extension.h>

#include <string>

#include "neusemslice_build_info.h"
#include "ops/cpu/capability.h"
#include "ops/cpu/stream.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// What setup.py decided (the switches of the README), and the compiler that carried it out.
pybind11::dict build_info() {
  pybind11::dict info = pybind11::module_::import("json").attr("loads")(NSS_BUILD_JSON);
  info["compiler"] = compiler();
  info["cxx_standard"] = __cplusplus;
  info["cpu_capability"] = neusemslice::cpu::capability_name();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Operators of neusemslice; use them through neusemslice.ops.";
  m.def("build_info", &build_info, "What this extension was built for, and with which switches.");
  m.def("cpu_capabilities", &neusemslice::cpu::capability_names,
        "Instruction sets that the CPU kernels can use here, the widest last.");
  m.def("set_cpu_capability", &neusemslice::cpu::set_capability,
        "Makes the CPU kernels use one of cpu_capabilities(). For tests; not beside a kernel.");
  m.def("stream_memory", &neusemslice::cpu::stream_memory,
        "Reads one tensor and rewrites another at the speed of memory. For benchmarks.");
  m.def("stream_rows", &neusemslice::cpu::stream_rows,
        "Rewrites rows of matrices and their state at the speed of memory. For benchmarks.");
}
