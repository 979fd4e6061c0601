#pragma once

// Device code of masked_sgd_ and masked_adamw_, free of torch.
//
// All tensors of a call are one table in device memory. It arrives as the parameters of a few small
// kernels, which a captured graph keeps by value: nothing on the host has to outlive the call, and
// nothing waits. Then one thread per row finds what depends on the row's number of updates (a power
// in double, too dear to repeat for each element) and raises that number, and one launch over the
// blocks of all tensors (of one type; kernels of several would spill) updates the elements, as many
// per thread as 16 bytes of the parameter hold.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/optimizer_math.h"
#include "common/step_scalars.h"
#include "common/tensor_update.h"
#include "ops/cuda/device.cuh"

namespace neusemslice::cuda {

constexpr int kUpdateThreads = 256;
constexpr int kUpdateBlocks = 3;           // at once on a multiprocessor: 85 registers, no spills
constexpr int64_t kUpdateElements = 2048;  // of a block

// Some entries of the table, without the axes that they do not have.
struct TablePiece {
  static constexpr int kEntries = 24;
  static constexpr int kWords = 480;

  int64_t first = 0;
  int count = 0;
  int begin[kEntries + 1] = {};
  uint64_t words[kWords];

  // False if there is no room left.
  bool append(const TensorUpdate& update) {
    const auto spare = (TunedRows::kMaxAxes - update.where.axis_count) * sizeof(TunedRows::Axis);
    const int size = static_cast<int>((sizeof(update) - spare) / sizeof(uint64_t));
    if (count == kEntries || begin[count] + size > kWords) return false;
    std::memcpy(words + begin[count], &update, size * sizeof(uint64_t));
    begin[count + 1] = begin[count] + size;
    ++count;
    return true;
  }
};
static_assert(kParametersFit<TablePiece, TensorUpdate*>);
static_assert(sizeof(TensorUpdate) % sizeof(uint64_t) == 0);

__global__ void write_table_kernel(const __grid_constant__ TablePiece piece,
                                   TensorUpdate* __restrict__ table) {
  uint64_t* slot = reinterpret_cast<uint64_t*>(table + piece.first + blockIdx.x);
  const int begin = piece.begin[blockIdx.x], end = piece.begin[blockIdx.x + 1];
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += static_cast<int>(blockDim.x)) {
    slot[i - begin] = piece.words[i];
  }
}

// The last of the tensors that begin at or before `index`, by one of their numbers.
NSS_HOST_DEVICE const TensorUpdate& tensor_at(const TensorUpdate* table, int64_t count,
                                              int64_t TensorUpdate::* begin, int64_t index) {
  int64_t low = 0;
  for (int64_t high = count; high - low > 1;) {
    const int64_t middle = low + (high - low) / 2;
    (table[middle].*begin <= index ? low : high) = middle;
  }
  return table[low];
}

template <typename Rule>
__device__ void begin_row(const Rule& rule, const StepScalars& scalars, const TensorUpdate& t,
                          int64_t r) {
  const int64_t row = t.where.rows[r];
  if (row < 0 || row >= t.where.dimension) return;
  static_cast<typename Rule::Row*>(t.row_shares)[r] =
      rule.row(scalars.lr(), t.steps ? t.steps[r] : 0);
  if (t.steps) t.steps[r] += 1;
}

// Rows of float64 tensors follow `wide`, all others `narrow`.
template <template <typename> class Rule>
__global__ void begin_rows_kernel(Rule<float> narrow, Rule<double> wide, StepScalars scalars,
                                  const TensorUpdate* __restrict__ table, int64_t count,
                                  int64_t rows) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (index >= rows || scalars.skipped()) return;
  const TensorUpdate& t = tensor_at(table, count, &TensorUpdate::first_row, index);
  if (t.element == Element::kFloat64) {
    begin_row(wide, scalars, t, index - t.first_row);
  } else {
    begin_row(narrow, scalars, t, index - t.first_row);
  }
}

// Values that are loaded and stored together, 16 bytes at a time.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T v[kCount];

  NSS_HOST_DEVICE static bool fits(const void* p) {
    return reinterpret_cast<uintptr_t>(p) % alignof(Pack) == 0;
  }
  NSS_HOST_DEVICE static Pack load(const void* p) { return *static_cast<const Pack*>(p); }
  NSS_HOST_DEVICE void store(void* p) const { *static_cast<Pack*>(p) = *this; }
};

// Updates elements of one tensor; S is their type in memory, kStates the number of states.
template <typename Rule, int kStates, typename S>
class DeviceUpdater {
  using V = ValueOf<S>;
  using Row = typename Rule::Row;

 public:
  static constexpr int kPack = 16 / sizeof(S);

  __device__ DeviceUpdater(const Rule& rule, const TensorUpdate& t, V scale)
      : rule_(rule), t_(t), scale_(scale) {}

  // Elements [first, first + kPack) in the order of the state, as far as there are that many.
  __device__ void run(int64_t first) const {
    const TunedRows& where = t_.where;
    const int64_t line = quotient(first, where.width), i = first - line * where.width;
    const TunedRows::Place start = where.line(line);
    const TunedRows::Axis& last = where.last();
    const bool together = i + kPack <= where.width && !where.across_rows() &&
                          last.param_stride == 1 && last.grad_stride == 1;
    if (together && all_fit(start.param + i, start.grad + i, first)) {
      if (start.row >= 0) update_together(start, i, first);
      return;
    }
    const int64_t end = first + kPack < t_.elements ? first + kPack : t_.elements;
    for (int64_t s = first; s < end; ++s) {
      const int64_t own = quotient(s, where.width);
      const TunedRows::Place at = where.along(where.line(own), s - own * where.width);
      if (at.row >= 0) update_one(at, s);
    }
  }

 private:
  using Elements = Pack<S, kPack>;
  using Values = Pack<V, kPack>;

  // Where both fit into 32 bits, a division is several times faster.
  __device__ static int64_t quotient(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return a / b;
  }

  __device__ S* param() const { return static_cast<S*>(t_.param); }
  __device__ const S* grad() const { return static_cast<const S*>(t_.grad); }
  __device__ V* state(int k) const { return static_cast<V*>(t_.states[k]); }
  __device__ Row row(int64_t r) const { return static_cast<const Row*>(t_.row_shares)[r]; }

  __device__ bool all_fit(int64_t param_at, int64_t grad_at, int64_t s) const {
    bool fit = Elements::fits(param() + param_at) && Elements::fits(grad() + grad_at);
    for (int k = 0; k < kStates; ++k) fit = fit && Values::fits(state(k) + s);
    return fit && (!t_.master || Values::fits(t_.master + s));
  }

  __device__ void update_together(const TunedRows::Place& start, int64_t i, int64_t s) const {
    S* const param_at = param() + start.param + i;
    Elements params{};
    Values masters{};
    if (t_.master) {
      masters = Values::load(t_.master + s);
    } else {
      params = Elements::load(param_at);
    }
    const Elements grads = Elements::load(grad() + start.grad + i);
    Values states[kStates + 1] = {};
    for (int k = 0; k < kStates; ++k) states[k] = Values::load(state(k) + s);
    const Row shares = row(start.row);
    for (int j = 0; j < kPack; ++j) {
      V own[kStates + 1] = {};
      for (int k = 0; k < kStates; ++k) own[k] = states[k].v[j];
      const V old = t_.master ? masters.v[j] : to_value(params.v[j]);
      masters.v[j] = step(rule_, shares, old, to_value(grads.v[j]), scale_, own);
      params.v[j] = from_value<S>(masters.v[j]);
      for (int k = 0; k < kStates; ++k) states[k].v[j] = own[k];
    }
    params.store(param_at);
    if (t_.master) masters.store(t_.master + s);
    for (int k = 0; k < kStates; ++k) states[k].store(state(k) + s);
  }

  __device__ void update_one(const TunedRows::Place& at, int64_t s) const {
    V own[kStates + 1] = {};
    for (int k = 0; k < kStates; ++k) own[k] = state(k)[s];
    const V old = t_.master ? static_cast<V>(t_.master[s]) : to_value(param()[at.param]);
    const V updated = step(rule_, row(at.row), old, to_value(grad()[at.grad]), scale_, own);
    param()[at.param] = from_value<S>(updated);
    if (t_.master) t_.master[s] = static_cast<float>(updated);
    for (int k = 0; k < kStates; ++k) state(k)[s] = own[k];
  }

  const Rule& rule_;
  const TensorUpdate& t_;
  V scale_;
};

// Tensors [first, last) of the table, all of elements S.
template <int kStates, typename S, typename Rule>
__global__ void __launch_bounds__(kUpdateThreads, kUpdateBlocks)
    update_kernel(Rule rule, StepScalars scalars, const TensorUpdate* __restrict__ table,
                  int64_t count) {
  if (scalars.skipped()) return;
  using Updater = DeviceUpdater<Rule, kStates, S>;
  const TensorUpdate& t = tensor_at(table, count, &TensorUpdate::first_block, blockIdx.x);
  const Updater updater(rule, t, scalars.scale());
  const int64_t begin = (blockIdx.x - t.first_block) * kUpdateElements;
  for (int64_t i = 0; i < kUpdateElements; i += kUpdateThreads * Updater::kPack) {
    const int64_t first = begin + i + static_cast<int64_t>(threadIdx.x) * Updater::kPack;
    if (first < t.elements) updater.run(first);
  }
}

inline void write_table(const std::vector<TensorUpdate>& updates, TensorUpdate* table) {
  TablePiece piece;
  const auto write = [&] {
    launch("write_table_kernel", &write_table_kernel, {piece.count}, kWarp, piece, table);
  };
  for (const TensorUpdate& t : updates) {
    if (piece.append(t)) continue;
    write();
    piece.first += piece.count;
    piece.count = 0;
    piece.append(t);
  }
  write();
}

// Takes the step. allocate(bytes) gives device memory, aligned to 16 bytes, that lives until the
// kernels have run, and as long as a graph that they are captured into.
template <int kStates, template <typename> class Rule, typename Allocate>
void launch_step(const Rule<float>& narrow, const Rule<double>& wide, const StepScalars& scalars,
                 std::vector<TensorUpdate>& updates, const Allocate& allocate) {
  std::stable_sort(updates.begin(), updates.end(),
                   [](const auto& a, const auto& b) { return a.element < b.element; });
  int64_t rows = 0;
  for (TensorUpdate& t : updates) {
    t.first_row = rows;
    rows += t.row_count;
  }
  if (rows == 0) return;
  const auto count = static_cast<int64_t>(updates.size());
  auto* table = static_cast<TensorUpdate*>(allocate(count * sizeof(TensorUpdate)));
  // Room for rows of either width.
  auto* shares =
      static_cast<typename Rule<double>::Row*>(allocate(rows * sizeof(typename Rule<double>::Row)));
  for (TensorUpdate& t : updates) t.row_shares = shares + t.first_row;

  // The blocks are numbered anew for each type.
  struct Part {
    int64_t first, last, blocks;
  };
  std::vector<Part> parts;
  for (int64_t i = 0; i < count; ++i) {
    TensorUpdate& t = updates[i];
    if (i == 0 || t.element != updates[i - 1].element) parts.push_back({i, i, 0});
    t.first_block = parts.back().blocks;
    parts.back().blocks += blocks_for(t.elements, kUpdateElements);
    parts.back().last = i + 1;
  }
  write_table(updates, table);
  launch("begin_rows_kernel", &begin_rows_kernel<Rule>, {blocks_for(rows, kUpdateThreads)},
         kUpdateThreads, narrow, wide, scalars, table, count, rows);
  for (const Part& part : parts) {
    with_element(updates[part.first].element, [&](auto element) {
      using S = decltype(element);
      const auto run = [&](const auto& rule) {
        launch("update_kernel", &update_kernel<kStates, S, std::decay_t<decltype(rule)>>,
               {part.blocks}, kUpdateThreads, rule, scalars, table + part.first,
               part.last - part.first);
      };
      if constexpr (std::is_same_v<S, double>) {
        run(wide);
      } else {
        run(narrow);
      }
    });
  }
}

}  // namespace neusemslice::cuda
