#pragma once

// Which instruction set the CPU kernels use: the widest that both this build and the processor
// have. Every kernel gives the same bits on each of them.

#include <string>
#include <vector>

namespace neusemslice::cpu {

// kAvx512Bitalg is kAvx512 with instructions that count the bits of bytes and of 16-bit words, and
// that move chosen words together (BITALG and VBMI2, which processors have together).
enum class Capability { kPortable, kAvx2, kAvx512, kAvx512Bitalg };

// The one in use.
Capability capability();
std::string capability_name();

// Those that work here, the widest last.
std::vector<std::string> capability_names();

// Makes the kernels use another one, so that tests reach each. Must not run beside a kernel.
// Throws std::invalid_argument for a name that capability_names() lacks.
void set_capability(const std::string& name);

}  // namespace neusemslice::cpu
