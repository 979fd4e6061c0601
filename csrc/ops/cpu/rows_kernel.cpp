// CPU kernels of the gradients of tuned rows (contract: ops/rows.h).
//
// Linear: the tuned columns of grad are gathered, by at::gather, because index_select runs on one
// thread along a last dimension, and one at::mm per block of input features is run on one thread,
// because BLAS on several may divide the sum over positions among them.
//
// Convolution: oneDNN's weight gradient takes as long for a tenth of the rows as for all of them,
// so this is a correlation of our own. A row's gradient is laid out as one line of places, and an
// input channel, its padding included, as planes of lines in the same order, one for each phase of
// a stride: for each tap the sum over all places is then that of one line times the other from an
// offset on, and neither edges nor strides matter in the loop (rows_body.h), which keeps 3 rows x 9
// taps in registers. Where a group has more than eight rows each column of the kernel has planes of
// its own: as an offset it is cheaper to lay out, but loads that cross cache lines cost more than
// that with many rows and short registers. Where there are fewer than nine taps, several channels
// are taken at a time. Milliseconds on one AVX-512 core (two threads), fp32, batch 128 (the last
// two: 32), against oneDNN's gradient of the whole weight:
//
//   inputs > outputs, places    whole     1 row   2 rows    10 %    25 %     all
//   16 > 16, 32 x 32, 3 x 3       8.1       0.5      0.7     0.7     1.3     4.9
//   32 > 32, 16 x 16, 3 x 3       3.5       0.4      0.5     0.7     1.4     5.0
//   64 > 64, 8 x 8, 3 x 3         3.0       0.3      0.4     0.8     1.9     5.9
//   64 > 64, 56 x 56, 3 x 3        55       2.1      2.7     5.8      13      64
//   256 > 64, 56 x 56, 1 x 1       53       4.5      4.6     5.9     9.4      33
//
// For all rows, train the layer whole. In half precision rows take as long, but the whole gradient
// of the first three lines only 2.5, 2.0 and 1.9 ms where the processor multiplies bfloat16.
//
// Norm: where a channel's places lie side by side, the sums of the tuned ones. Else ATen's own
// gradient of all channels, which costs less than gathering a few of them; it divides the sums
// among as many threads as there are, so each thread gets stretches of places, whose number the
// shape says.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <set>
#include <vector>

#include "ops/checks.h"
#include "ops/cpu/capability.h"
#include "ops/cpu/rows_job.h"
#include "ops/rows.h"
#include "ops/similarity.h"

namespace neusemslice::ops {
namespace {

const cpu::RowsLoops& loops() {
#if defined(__x86_64__)
  if (cpu::capability() >= cpu::Capability::kAvx512) return cpu::kRowsAvx512;
  if (cpu::capability() == cpu::Capability::kAvx2) return cpu::kRowsAvx2;
#endif
  return cpu::kRowsPortable;
}

at::ScalarType value_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Some of the last dimension.
at::Tensor columns_of(const at::Tensor& x, const at::Tensor& columns) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = columns.numel();
  return x.gather(-1, columns.expand(sizes));
}

constexpr int64_t kFeatures = 192;  // of one at::mm

at::Tensor rows_linear_backward_cpu(const at::Tensor& grad, const at::Tensor& x,
                                    const at::Tensor& rows) {
  const PlainDispatch plain;
  const LinearRows linear = checked_linear(grad, x, rows);
  const at::ScalarType value = value_type(grad);
  const int64_t features = linear.x.size(1);
  at::Tensor out = at::empty({rows.numel(), features}, grad.options().dtype(value));
  if (out.numel() == 0) return out.to(grad.scalar_type());
  if (linear.x.size(0) == 0) return out.zero_().to(grad.scalar_type());
  // Rising rows, as many as there are columns, are all of them.
  const bool all = rows.numel() == linear.grad.size(1);
  const at::Tensor chosen = all ? linear.grad : columns_of(linear.grad, rows);
  const at::Tensor columns = chosen.to(value).t();
  at::parallel_for(0, (features + kFeatures - 1) / kFeatures, 1, [&](int64_t begin, int64_t end) {
    const PlainDispatch plain_here;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kFeatures, count = std::min(kFeatures, features - first);
      at::Tensor part = out.narrow(1, first, count);
      at::mm_out(part, columns, linear.x.narrow(1, first, count).to(value));
    }
  });
  return out.to(grad.scalar_type());
}

// Adds all parts, the first dimension, to the first one, one after another.
void add_parts(const at::Tensor& sums) {
  AT_DISPATCH_FLOATING_TYPES(sums.scalar_type(), "add_parts", [&] {
    scalar_t* total = sums.mutable_data_ptr<scalar_t>();
    const int64_t size = sums.numel() / sums.size(0);
    for (int64_t part = 1; part < sums.size(0); ++part) {
      for (int64_t i = 0; i < size; ++i) total[i] += total[part * size + i];
    }
  });
}

// How many parts the samples are divided into, for want of other work for the threads: by their
// number alone, so that the order of the sums is that of the shapes.
int64_t parts_of(int64_t samples) { return std::clamp<int64_t>(samples / 16, 1, 8); }

cpu::ConvRowsLayout layout_of(const ConvShape& shape, int64_t rows) {
  // The dimensions in which a tap is an offset. Planes of their own for the columns pay where a
  // group has more than eight rows.
  const int offsets = rows > 8 * shape.groups ? 2 : 3;
  cpu::ConvRowsLayout at{};
  at.inputs = shape.inputs;
  at.input = shape.input;
  at.output = shape.output;
  at.stride = shape.stride;
  at.padding = shape.padding;
  std::set<cpu::Sizes3> phases;
  const auto for_each_tap = [&](auto visit) {
    for (int64_t z = 0; z < shape.kernel[0]; ++z) {
      for (int64_t y = 0; y < shape.kernel[1]; ++y) {
        for (int64_t x = 0; x < shape.kernel[2]; ++x) {
          cpu::Sizes3 phase{z, y, x}, shift{};
          for (int d = 0; d < 3; ++d) {
            const int64_t from = phase[d] * shape.dilation[d];
            phase[d] = d < offsets ? from % shape.stride[d] : from;
            shift[d] = d < offsets ? from / shape.stride[d] : 0;
          }
          visit(phase, shift);
        }
      }
    }
  };
  for_each_tap([&](const cpu::Sizes3& phase, const cpu::Sizes3& shift) {
    phases.insert(phase);
    for (int d = 0; d < 3; ++d) {
      at.extent[d] = std::max(at.extent[d], shape.output[d] + shift[d]);
    }
  });
  at.phases.assign(phases.begin(), phases.end());
  at.plane = (at.extent[0] * at.extent[1] * at.extent[2] + 15) / 16 * 16;
  const auto place = [&](const cpu::Sizes3& p) {
    return (p[0] * at.extent[1] + p[1]) * at.extent[2] + p[2];
  };
  for_each_tap([&](const cpu::Sizes3& phase, const cpu::Sizes3& shift) {
    const auto number = std::lower_bound(at.phases.begin(), at.phases.end(), phase);
    at.offsets.push_back((number - at.phases.begin()) * at.plane + place(shift));
  });
  const int64_t places = place({shape.output[0] - 1, shape.output[1] - 1, shape.output[2] - 1}) + 1;
  at.line = (places + 15) / 16 * 16;
  // The last tap's line may end behind the last plane.
  at.planes = static_cast<int64_t>(at.phases.size()) * at.plane + 16;
  return at;
}

// Samples from channels last to planes. Four by four where elements have four bytes: compilers make
// shuffles of that.
template <typename T>
void to_planes(const T* from, int64_t samples, int64_t places, int64_t channels, T* to) {
  constexpr int64_t kStretch = 64;  // places whose channels stay in the cache
  for (const T* const end = from + samples * places * channels; from < end;
       from += places * channels, to += places * channels) {
    for (int64_t first = 0; first < places; first += kStretch) {
      const int64_t last = std::min(first + kStretch, places);
      int64_t c = 0;
      if constexpr (sizeof(T) <= 4) {
        for (; c + 4 <= channels && last - first == kStretch; c += 4) {
          for (int64_t p = first; p < last; p += 4) {
            T block[4][4];
            for (int i = 0; i < 4; ++i) {
              for (int j = 0; j < 4; ++j) block[j][i] = from[(p + i) * channels + c + j];
            }
            for (int j = 0; j < 4; ++j) std::copy_n(block[j], 4, to + (c + j) * places + p);
          }
        }
      }
      for (; c < channels; ++c) {
        for (int64_t p = first; p < last; ++p) to[c * places + p] = from[p * channels + c];
      }
    }
  }
}

// Samples [first, last) as planes.
void copy_as_planes(const at::Tensor& x, int64_t first, int64_t last, void* planes) {
  const int64_t size = x.numel() / x.size(0);
  const auto copy = [&](auto element) {
    using T = decltype(element);
    to_planes(static_cast<const T*>(x.const_data_ptr()) + first * size, last - first,
              size / x.size(1), x.size(1), static_cast<T*>(planes));
  };
  if (x.element_size() == 8) {
    copy(uint64_t{});
  } else if (x.element_size() == 4) {
    copy(uint32_t{});
  } else {
    copy(uint16_t{});
  }
}

at::Tensor rows_conv_backward_cpu(const at::Tensor& grad, const at::Tensor& x,
                                  const at::Tensor& rows, at::IntArrayRef kernel_size,
                                  at::IntArrayRef stride, at::IntArrayRef padding,
                                  at::IntArrayRef dilation, int64_t groups) {
  const PlainDispatch plain;
  const ConvShape shape =
      checked_conv(grad, x, rows, kernel_size, stride, padding, dilation, groups);
  const std::vector<int64_t> sizes = conv_rows_sizes(shape, rows, kernel_size);
  const int64_t count = rows.numel();
  if (count == 0 || shape.inputs == 0 || grad.numel() == 0) return at::zeros(sizes, grad.options());

  const cpu::ConvRowsLayout layout = layout_of(shape, count);
  const auto options = grad.options().dtype(value_type(grad));
  const at::Tensor row_list = rows.contiguous();
  const int64_t* row = row_list.const_data_ptr<int64_t>();
  const at::Tensor packed = at::empty({shape.samples, count, layout.line}, options);
  cpu::PackGradJob pack{&layout,
                        element_of(grad),
                        grad.const_data_ptr(),
                        grad.stride(0),
                        grad.stride(1),
                        {0, 0, 0},
                        row,
                        count,
                        packed.mutable_data_ptr()};
  for (int64_t d = 2; d < grad.dim(); ++d) pack.strides[3 - grad.dim() + d] = grad.stride(d);
  at::parallel_for(0, shape.samples, 1,
                   [&](int64_t begin, int64_t end) { loops().pack_grad(pack, begin, end); });

  const int64_t parts = parts_of(shape.samples);
  const at::Tensor sums = at::empty({parts, count, shape.inputs, shape.taps()}, options);
  const int64_t block = std::max<int64_t>(1, 9 / shape.taps());
  const int64_t blocks = (shape.inputs + block - 1) / block;
  const int64_t outputs = shape.outputs / groups;
  char* const first_sum = static_cast<char*>(sums.mutable_data_ptr());
  const int64_t part_bytes = count * shape.inputs * shape.taps() * sums.element_size();
  // Of some blocks of a group's input channels, for samples that the job counts from `first` on.
  const auto run = [&](const cpu::ConvRowsJob& job, int64_t part, int64_t group, int64_t begin,
                       int64_t end, int64_t first) {
    const auto first_row = std::lower_bound(row, row + count, group * outputs) - row;
    const auto last_row = std::lower_bound(row, row + count, (group + 1) * outputs) - row;
    if (first_row == last_row) return;
    loops().conv_rows(
        job, {part * shape.samples / parts - first, (part + 1) * shape.samples / parts - first,
              first_row, last_row, begin * block, std::min(end * block, shape.inputs),
              group * shape.inputs, first_sum + part * part_bytes});
  };
  cpu::ConvRowsJob job{&layout, element_of(x), nullptr, x.size(1), packed.const_data_ptr(), count};
  const int64_t sample = x.numel() / shape.samples;
  const bool last = !x.is_contiguous() && x.movedim(1, -1).is_contiguous();
  if (last && parts >= at::get_num_threads()) {
    // Channels last: whoever takes a part makes planes of it, which stay in the cache.
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      const int64_t most = shape.samples / parts + 1;
      const auto planes = std::make_unique_for_overwrite<char[]>(most * sample * x.element_size());
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = part * shape.samples / parts;
        copy_as_planes(x, first, (part + 1) * shape.samples / parts, planes.get());
        cpu::ConvRowsJob own = job;
        own.x = planes.get();
        own.packed = static_cast<const char*>(job.packed) +
                     first * count * layout.line * packed.element_size();
        for (int64_t group = 0; group < groups; ++group) run(own, part, group, 0, blocks, first);
      }
    });
  } else {
    // Channels are read as planes; other strides are copied once.
    const at::Tensor input = last ? at::empty(x.sizes(), x.options()) : x.contiguous();
    if (last) {
      char* const planes = static_cast<char*>(input.mutable_data_ptr());
      at::parallel_for(0, shape.samples, 1, [&](int64_t begin, int64_t end) {
        copy_as_planes(x, begin, end, planes + begin * sample * x.element_size());
      });
    }
    job.x = input.const_data_ptr();
    at::parallel_for(0, parts * groups * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin, next = 0; task < end; task = next) {
        next = std::min(end, (task / blocks + 1) * blocks);  // in one go what is of one group
        const int64_t from = task % blocks;
        run(job, task / (groups * blocks), task / blocks % groups, from, from + next - task, 0);
      }
    });
  }
  add_parts(sums);
  return sums[0].view(sizes).to(grad.scalar_type(), false, true);
}

// The sums of rows of grad, contiguous, or of grad * (x - center) if there is an x.
void sum_rows(const at::Tensor& grad, int64_t dim, const at::Tensor& rows, const at::Tensor* x,
              const at::Tensor* center, const at::Tensor& out) {
  cpu::RowSumsJob job{element_of(grad),
                      grad.const_data_ptr(),
                      x ? x->const_data_ptr() : nullptr,
                      center ? center->const_data_ptr() : nullptr,
                      1,
                      grad.size(dim),
                      1,
                      rows.const_data_ptr<int64_t>(),
                      out.mutable_data_ptr()};
  for (int64_t d = 0; d < dim; ++d) job.outer *= grad.size(d);
  for (int64_t d = dim + 1; d < grad.dim(); ++d) job.inner *= grad.size(d);
  at::parallel_for(0, rows.numel(), 1,
                   [&](int64_t begin, int64_t end) { loops().row_sums(job, begin, end); });
}

at::Tensor rows_bias_backward_cpu(const at::Tensor& grad, const at::Tensor& rows,
                                  int64_t neuron_dim) {
  const PlainDispatch plain;
  const int64_t dim = checked_bias(grad, rows, neuron_dim);
  at::Tensor out = at::zeros({rows.numel()}, grad.options().dtype(value_type(grad)));
  if (out.numel() != 0 && grad.numel() != 0) {
    // Read front to back. Where the neurons lie side by side (channels last), those of the rows are
    // gathered; other strides are copied once.
    const at::Tensor last = grad.movedim(dim, -1);
    const bool gathered = !grad.is_contiguous() && last.is_contiguous();
    const at::Tensor read =
        gathered ? columns_of(last, rows).movedim(-1, dim).contiguous() : grad.contiguous();
    const at::Tensor row_list =
        gathered ? at::arange(rows.numel(), rows.options()) : rows.contiguous();
    sum_rows(read, dim, row_list, nullptr, nullptr, out);
  }
  return out.to(grad.scalar_type());
}

constexpr int64_t kNormPlane = 16;  // places from which on a neuron's are summed by themselves
constexpr int64_t kNormElements = 262'144;  // of a part, at least, unless there are few parts
constexpr int64_t kNormParts = 64;          // at most

std::tuple<at::Tensor, at::Tensor> rows_norm_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var,
    double eps, const at::Tensor& rows, const at::Tensor& bias_rows) {
  const PlainDispatch plain;
  const NormRows norm = checked_norm(grad, x, mean, var, rows, bias_rows);
  if (x.numel() == 0) return norm_of_nothing(mean, rows, bias_rows);
  const int64_t channels = x.size(1), places = x.numel() / channels;
  if (norm.x.is_contiguous() && places / x.size(0) >= kNormPlane) {
    const at::Tensor of_weight = at::empty(rows.sizes(), norm.mean.options());
    const at::Tensor of_bias = at::empty(bias_rows.sizes(), norm.mean.options());
    const at::Tensor own = rows.contiguous();
    sum_rows(norm.grad, 1, own, &norm.x, &norm.mean, of_weight);
    sum_rows(norm.grad, 1, bias_rows.contiguous(), nullptr, nullptr, of_bias);
    of_weight.mul_(norm.var.index_select(0, own).add_(eps).rsqrt_());
    return {of_weight.to(mean.scalar_type()), of_bias.to(mean.scalar_type())};
  }
  // [1, C, P, 1] of [N, C, ...] in channels last, or of [N, C].
  const auto flat = [&](const at::Tensor& t) {
    return t.as_strided({1, channels, places, 1}, {t.numel(), 1, channels, channels});
  };
  const bool side_by_side = places == x.size(0) || !norm.x.is_contiguous();
  const at::Tensor of = side_by_side ? flat(norm.grad) : norm.grad;
  const at::Tensor read = side_by_side ? flat(norm.x) : norm.x;
  const int64_t dim = side_by_side ? 2 : 0, size = read.size(dim);
  // At least two, so that parallel_for does not leave the threads to ATen.
  const int64_t parts =
      std::min(size, std::clamp<int64_t>(x.numel() / kNormElements, 2, kNormParts));
  const at::Tensor sums = at::empty({parts, 2, channels}, norm.mean.options());
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const PlainDispatch plain_here;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * size / parts, count = (part + 1) * size / parts - first;
      const auto [of_input, of_weight, of_bias] = at::native_batch_norm_backward(
          of.narrow(dim, first, count), read.narrow(dim, first, count), norm.weight, norm.mean,
          norm.var, {}, {}, false, eps, {false, true, true});
      sums[part][0].copy_(of_weight);
      sums[part][1].copy_(of_bias);
    }
  });
  add_parts(sums);
  const at::Tensor whole = sums[0].to(mean.scalar_type());
  return {whole[0].index_select(0, rows), whole[1].index_select(0, bias_rows)};
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CPU, m) {
  m.impl("rows_linear_backward", &neusemslice::ops::rows_linear_backward_cpu);
  m.impl("rows_conv_backward", &neusemslice::ops::rows_conv_backward_cpu);
  m.impl("rows_bias_backward", &neusemslice::ops::rows_bias_backward_cpu);
  m.impl("rows_norm_backward", &neusemslice::ops::rows_norm_backward_cpu);
}
