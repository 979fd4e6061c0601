#include "ops/cpu/capability.h"

#include <algorithm>
#include <stdexcept>

namespace neusemslice::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bitalg"};

Capability widest() {
#if defined(__x86_64__)
  // F16C came before AVX2 on every processor that has the latter.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    const bool counts =
        __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vbmi2");
    return counts ? Capability::kAvx512Bitalg : Capability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::kAvx2;
#endif
  return Capability::kPortable;
}

Capability& active() {
  static Capability value = widest();
  return value;
}

}  // namespace

Capability capability() { return active(); }

std::string capability_name() { return kNames[static_cast<int>(capability())]; }

std::vector<std::string> capability_names() {
  return {kNames, kNames + static_cast<int>(widest()) + 1};
}

void set_capability(const std::string& name) {
  const auto names = capability_names();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) {
    throw std::invalid_argument("set_cpu_capability: this processor has no '" + name + "'");
  }
  active() = static_cast<Capability>(found - names.begin());
}

}  // namespace neusemslice::cpu
