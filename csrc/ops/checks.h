#pragma once

// Argument checks shared by the operators. A message names the operator, the argument, what was
// expected and what came; Python sees ValueError or TypeError.

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <sstream>
#include <string>

#include "common/elements.h"

namespace neusemslice {

// A dtype under the name it has in Python.
inline std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return "float64";
    case at::kFloat:
      return "float32";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kLong:
      return "int64";
    case at::kInt:
      return "int32";
    case at::kBool:
      return "bool";
    default:
      return c10::toString(dtype);
  }
}

// "int32 [4, 3] on cpu": how a tensor is described in messages.
inline std::string describe(const at::Tensor& t) {
  std::ostringstream out;
  out << dtype_name(t.scalar_type()) << " " << t.sizes() << " on " << t.device();
  return out.str();
}

// An item of a list of tensors, as messages name it: written out only where there is a message.
struct ListItem {
  const char* list;
  size_t index;
};

inline std::ostream& operator<<(std::ostream& out, const ListItem& item) {
  return out << item.list << "[" << item.index << "]";
}

// `argument` is the argument's name: a string or a ListItem.

template <typename Name>
void check_dtype(const at::Tensor& t, at::ScalarType dtype, const char* op, const Name& argument) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, op, ": ", argument, " must be ", dtype_name(dtype),
                   ", got ", describe(t));
}

template <typename Name>
void check_floating(const at::Tensor& t, const char* op, const Name& argument) {
  const bool known = t.scalar_type() == at::kDouble || t.scalar_type() == at::kFloat ||
                     t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16;
  TORCH_CHECK_TYPE(known, op, ": ", argument,
                   " must be float64, float32, float16 or bfloat16, got ", describe(t));
}

// The elements of a tensor that check_floating() lets pass.
inline Element element_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return Element::kFloat64;
    case at::kFloat:
      return Element::kFloat32;
    case at::kHalf:
      return Element::kFloat16;
    default:
      return Element::kBFloat16;
  }
}

template <typename Name>
void check_shape(const at::Tensor& t, at::IntArrayRef shape, const char* op, const Name& argument) {
  TORCH_CHECK_VALUE(t.sizes() == shape, op, ": ", argument, " must have shape ", shape, ", got ",
                    describe(t));
}

template <typename Name>
void check_contiguous(const at::Tensor& t, const char* op, const Name& argument) {
  TORCH_CHECK_VALUE(t.is_contiguous(), op, ": ", argument, " must be contiguous, got ", describe(t),
                    " with strides ", t.strides());
}

template <typename Name>
void check_device(const at::Tensor& t, at::Device device, const char* op, const Name& argument) {
  TORCH_CHECK_VALUE(t.device() == device, op, ": ", argument, " must be on ", device, ", got ",
                    describe(t));
}

// Autograd must notice an operator that writes into its argument: a backward pass over a graph
// that saved the old value then raises instead of using the new one.
inline void bump_version(const at::Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

}  // namespace neusemslice
