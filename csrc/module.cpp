// The Python module `neusemslice._C`. Importing it loads the shared object, whose static
// initialisers register the operators with the dispatcher; Python then calls them as
// torch.ops.neusemslice.*, which torch.compile can trace and a pybind11 function is not.
//
// The only file that includes torch/extension.h, which takes half a minute to compile.

#include <torch/extension.h>

#include <string>

#include "neusemslice_build_info.h"

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
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Operators of neusemslice; use them through neusemslice.ops.";
  m.def("build_info", &build_info, "What this extension was built for, and with which switches.");
}
