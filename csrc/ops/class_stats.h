#pragma once

// Streaming statistics of neurons, per class.
//
// class_order: a stable order of the samples by class, found once per batch and shared by every
//   site of that batch. `order` is a permutation of 0..N-1: the samples of class 0, of class 1,
//   ..., and last those labelled -100. Class k is order[offsets[k]..offsets[k+1]). A label outside
//   [0, K) other than -100 is refused on the CPU; on CUDA, where the host cannot look without
//   waiting, it is ordered last and so ignored.
//
//   Soft labels need no operator: `order` may name a sample several times, once for each class that
//   it is shared between, and `share` then holds the part of it that each entry stands for.
//
// class_stats_: adds a batch to the state of one site, in place.
//   x has its samples in dimension 0, its neurons in `neuron_dim`, and positions (pixels, tokens)
//   in the others. a[n, c], the mean of x over the positions of sample n that the mask keeps,
//   enters `mean` and `m2`; `mean_abs`, `max` and `active` (share of values > 0) are over
//   positions. A sample of weight or share 0, without a class, or without a position left is
//   skipped; otherwise it enters with the product of the two. A value that is not finite is counted
//   in `nonfinite` (once per class of its sample) and enters the sums as 0 and the maximum not at
//   all. Sums are taken in a fixed order, so the result has the same bits each time, at any number
//   of threads and on any CPU; on CUDA, where the order is another, each time. They are in float64,
//   except that float32, float16 and bfloat16 are added in float32 first: up to eight rows as
//   deviations from a shift (the class's mean so far, or its first row; where CUDA pools a sample,
//   the sample's), up to sixteen values of a plane as they are. With u = 2^-24, that changes a sum
//   of rows by at most 8u times the sum of its absolute terms, a sum of squares by 10u times
//   itself, and a plane's mean by 16u times its mean absolute value; by one or two u as a rule. A
//   shift far from the mean is the worst case for `m2`: a new class whose first row lies z standard
//   deviations from its mean has (1 + z^2) times as much to add.
//   The CPU refuses weights and shares that are negative or not finite, and an order that
//   class_order could not have made. On CUDA, where the host cannot look without waiting, such a
//   weight skips its sample, and such an order touches nothing outside of the tensors but leaves
//   statistics that mean nothing.
//
// class_stats_many_: class_stats_ at several sites of one batch, with the bits of as many calls.
//   The lists have an entry for each site, in the same order; those of a statistic that is absent
//   at all sites are empty. The sites hold the same statistics and no tensor in common; a message
//   names the site by its place in the lists. On CUDA it is one set of launches for many small
//   layers.
//
// class_stats_merge_: adds the state `other` to a state; the empty state is neutral.
//
// State of K classes and C neurons, all contiguous:
//   count, positions  float64 [K]     sum of weights, of samples and of their positions
//   nonfinite         int64 [C]
//   mean, m2          float64 [K, C]  zero where the class is empty; m2 needs mean
//   mean_abs, active  float32 [K, C]  zero where the class is empty
//   max               float32 [K, C]  -inf where the class is empty
// An absent (null) statistic is neither computed nor stored.

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/class_state.h"

namespace neusemslice::ops {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> class_order(const at::Tensor& labels, int64_t num_classes);

void class_stats_(const at::Tensor& count, const at::Tensor& positions, const at::Tensor& nonfinite,
                  const OptionalTensor& mean, const OptionalTensor& m2,
                  const OptionalTensor& mean_abs, const OptionalTensor& max,
                  const OptionalTensor& active, const at::Tensor& x, const at::Tensor& order,
                  const at::Tensor& offsets, const OptionalTensor& share,
                  const OptionalTensor& weight, const OptionalTensor& mask, int64_t neuron_dim);

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

void class_stats_many_(at::TensorList counts, at::TensorList positions, at::TensorList nonfinites,
                       at::TensorList means, at::TensorList m2s, at::TensorList mean_abs,
                       at::TensorList maxs, at::TensorList actives, at::TensorList xs,
                       const at::Tensor& order, const at::Tensor& offsets,
                       const OptionalTensor& share, const OptionalTensor& weight,
                       const OptionalTensors& masks, at::IntArrayRef neuron_dims);

void class_stats_merge_(const at::Tensor& count, const at::Tensor& positions,
                        const at::Tensor& nonfinite, const OptionalTensor& mean,
                        const OptionalTensor& m2, const OptionalTensor& mean_abs,
                        const OptionalTensor& max, const OptionalTensor& active,
                        const at::Tensor& other_count, const at::Tensor& other_positions,
                        const at::Tensor& other_nonfinite, const OptionalTensor& other_mean,
                        const OptionalTensor& other_m2, const OptionalTensor& other_mean_abs,
                        const OptionalTensor& other_max, const OptionalTensor& other_active);

// What the CPU and the CUDA kernels share: checked tensors, reduced to raw pointers and strides.

// x[n, p, c] lies at x + n * stride_n + p * stride_p + c * stride_c.
struct ClassOperand {
  at::Tensor x;  // keeps alive a copy made when the positions had no single stride
  int64_t stride_n;
  int64_t stride_p;
  int64_t stride_c;
};

struct ClassBatch : ClassOperand {
  at::Tensor mask;    // bool [N, P] contiguous, or undefined
  at::Tensor share;   // float64 [entries of order] contiguous, or undefined
  at::Tensor weight;  // float64 [N] contiguous, or undefined
  int64_t samples;
  int64_t positions;
};

// Checks a state's tensors; `prefix` ("" or "other_") goes before their names in messages.
ClassState checked_state(const char* op, const char* prefix, const at::Tensor& count,
                         const at::Tensor& positions, const at::Tensor& nonfinite,
                         const OptionalTensor& mean, const OptionalTensor& m2,
                         const OptionalTensor& mean_abs, const OptionalTensor& max,
                         const OptionalTensor& active);

// The dimension of x that holds the neurons, from 1 on.
int64_t checked_neuron_dim(const char* op, const at::Tensor& x, int64_t neuron_dim);

ClassOperand class_operand(const at::Tensor& x, int64_t neurons_at);

ClassBatch checked_batch(const char* op, const ClassState& state, at::Device device,
                         const at::Tensor& x, const at::Tensor& order, const at::Tensor& offsets,
                         const OptionalTensor& share, const OptionalTensor& weight,
                         const OptionalTensor& mask, int64_t neuron_dim);

// One site of class_stats_many_.
struct ClassSite {
  ClassState state;
  ClassBatch batch;
};

// How messages name site i.
std::string site_name(size_t i);

std::vector<ClassSite> checked_sites(at::TensorList counts, at::TensorList positions,
                                     at::TensorList nonfinites, at::TensorList means,
                                     at::TensorList m2s, at::TensorList mean_abs,
                                     at::TensorList maxs, at::TensorList actives, at::TensorList xs,
                                     const at::Tensor& order, const at::Tensor& offsets,
                                     const OptionalTensor& share, const OptionalTensor& weight,
                                     const OptionalTensors& masks, at::IntArrayRef neuron_dims);

// Refuses a merge of states that differ in size or in the statistics that they hold.
void check_mergeable(const ClassState& state, const ClassState& other);

// Marks the state's tensors as changed.
void bump_state(const at::Tensor& count, const at::Tensor& positions, const at::Tensor& nonfinite,
                const OptionalTensor& mean, const OptionalTensor& m2,
                const OptionalTensor& mean_abs, const OptionalTensor& max,
                const OptionalTensor& active);

}  // namespace neusemslice::ops
