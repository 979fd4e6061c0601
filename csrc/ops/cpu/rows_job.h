#pragma once

// The loops of rows_conv_backward, rows_bias_backward and rows_norm_backward, free of torch. They
// lie in rows_body.h, which is compiled once per instruction set.

#include <array>
#include <cstdint>
#include <vector>

#include "common/elements.h"

namespace neusemslice::cpu {

using Sizes3 = std::array<int64_t, 3>;

// Values are laid out so that a tap of the kernel is an offset: see rows_kernel.cpp. Lines are
// `line` values long, a multiple of 16.
struct ConvRowsLayout {
  int64_t inputs;  // channels of each group
  Sizes3 input;
  Sizes3 output;
  Sizes3 stride;
  Sizes3 padding;
  Sizes3 extent;                 // of a plane
  std::vector<Sizes3> phases;    // what a plane's places begin with, padding included
  std::vector<int64_t> offsets;  // of the taps, in the planes of a channel
  int64_t line;                  // of a row's gradient
  int64_t plane;                 // from one plane to the next, a multiple of 16
  int64_t planes;                // values of a channel's planes and of the zeros behind them
};

// grad: any strides; the rows' lines of every sample, [samples, rows, line], zeros where there is
// no place of the output.
struct PackGradJob {
  const ConvRowsLayout* layout;
  Element element;
  const void* grad;
  int64_t sample_stride;
  int64_t channel_stride;
  Sizes3 strides;
  const int64_t* rows;
  int64_t row_count;
  void* packed;
};

// Sums over samples for the rows [first_row, last_row), which are those of one group, and some of
// the input channels.
struct ConvRowsJob {
  const ConvRowsLayout* layout;
  Element element;
  const void* x;  // [samples, all channels, input] contiguous
  int64_t channels;
  const void* packed;
  int64_t row_count;
};

struct ConvRowsPart {
  int64_t first_sample;
  int64_t last_sample;
  int64_t first_row;
  int64_t last_row;
  int64_t first_input;  // of the group's
  int64_t last_input;
  int64_t channel;  // that the group begins with
  void* sums;       // [rows, inputs, taps]
};

// Sums over the places of rows of grad, or of grad * (x - center): [outer, neurons, inner]
// contiguous.
struct RowSumsJob {
  Element element;
  const void* grad;
  const void* x;       // or null
  const void* center;  // [neurons]
  int64_t outer;
  int64_t neurons;
  int64_t inner;
  const int64_t* rows;
  void* sums;  // [rows]
};

// Sums and packed values are float64 for float64 elements, else float32.
struct RowsLoops {
  void (*pack_grad)(const PackGradJob& job, int64_t first_sample, int64_t last_sample);
  void (*conv_rows)(const ConvRowsJob& job, const ConvRowsPart& part);
  void (*row_sums)(const RowSumsJob& job, int64_t first_row, int64_t last_row);
};

extern const RowsLoops kRowsPortable;
extern const RowsLoops kRowsAvx2;
extern const RowsLoops kRowsAvx512;

}  // namespace neusemslice::cpu
