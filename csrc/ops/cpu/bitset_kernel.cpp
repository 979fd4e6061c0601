// CPU kernels of packed sets (contract: ops/similarity.h).
//
// The sets of a block of columns are laid side by side, 16 elements at a time, so that a register
// holds the same elements of many columns and the counts of a row with them; nothing is added
// across a register. What follows is integers: an edge is a pair whose common size reaches the
// least that its threshold allows, looked up by the pair's sizes. A linear bound in 16 bits, a
// little below, spares most pairs the look.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/similarity.h"
#include "ops/checks.h"
#include "ops/cpu/similarity_job.h"
#include "ops/cpu/similarity_tiles.h"
#include "ops/similarity.h"

namespace neusemslice::ops {
namespace {

constexpr int64_t kStepBits = 16;
constexpr int64_t kWordSteps = kWordBits / kStepBits;

at::Tensor bitset_pack_cpu(const at::Tensor& bits) {
  const PackWork work = checked_bits(bits);
  if (work.words.numel() == 0) return work.words;
  const bool* in = work.bits.const_data_ptr<bool>();
  int64_t* out = work.words.mutable_data_ptr<int64_t>();
  at::parallel_for(0, work.words.numel(), 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % work.words_per_row * kWordBits;
      out[i] = pack_word(in + i / work.words_per_row * work.size + first,
                         std::min(kWordBits, work.size - first));
    }
  });
  return work.words;
}

std::vector<int64_t> set_sizes(const at::Tensor& sets) {
  const int64_t* data = sets.const_data_ptr<int64_t>();
  const int64_t words = sets.size(1);
  std::vector<int64_t> sizes(sets.size(0));
  at::parallel_for(0, sets.size(0), 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) sizes[r] = set_size(data + r * words, words);
  });
  return sizes;
}

// The sets as the counting loops read them.
struct PreparedSets {
  const Sets& sets;
  std::vector<int64_t> row_sizes;
  std::vector<int64_t> col_sizes;
  int64_t steps;               // up to the last in which a set has an element: bounds all sizes
  std::vector<uint16_t> rows;  // [rows, steps]
  std::vector<uint16_t> cols;  // [blocks, steps, kTile]

  explicit PreparedSets(const Sets& given)
      : sets(given),
        row_sizes(set_sizes(given.a)),
        col_sizes(given.self ? row_sizes : set_sizes(given.b)),
        steps(std::max(used_steps(given.a), given.self ? 0 : used_steps(given.b))),
        rows(given.rows * steps),
        cols((given.cols + kTile - 1) / kTile * kTile * steps) {
    if (steps == 0) return;
    const int64_t* a = sets.a.const_data_ptr<int64_t>();
    at::parallel_for(0, sets.rows, 256, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) copy_steps(a + r * sets.words, &rows[r * steps]);
    });
    const int64_t* b = sets.b.const_data_ptr<int64_t>();
    at::parallel_for(0, sets.cols, kTile, [&](int64_t begin, int64_t end) {
      std::vector<uint16_t> own(steps);
      for (int64_t c = begin; c < end; ++c) {
        copy_steps(b + c * sets.words, own.data());
        uint16_t* out = &cols[c / kTile * kTile * steps + c % kTile];
        for (int64_t s = 0; s < steps; ++s) out[s * kTile] = own[s];
      }
    });
  }

 private:
  void copy_steps(const int64_t* words, uint16_t* out) const {
    std::memcpy(out, words, steps * sizeof(uint16_t));
  }

  static int64_t used_steps(const at::Tensor& of) {
    const int64_t* data = of.const_data_ptr<int64_t>();
    std::vector<int64_t> any(of.size(1), 0);
    for (int64_t c = 0; c < of.size(0); ++c) {
      for (int64_t w = 0; w < of.size(1); ++w) any[w] |= data[c * of.size(1) + w];
    }
    std::vector<uint16_t> steps(of.size(1) * kWordSteps);
    if (!steps.empty()) std::memcpy(steps.data(), any.data(), steps.size() * sizeof(uint16_t));
    while (!steps.empty() && steps.back() == 0) steps.pop_back();
    return static_cast<int64_t>(steps.size());
  }
};

// What one thread needs for a tile. Counts have 16 bits where one piece holds all elements.
template <typename Count>
class SetTile {
 public:
  explicit SetTile(const PreparedSets& prepared)
      : prepared_(prepared),
        loops_(similarity_loops()),
        common_(kTile * kTile),
        piece_(std::is_same_v<Count, uint16_t> ? 0 : kTile * kTile) {}

  // Counts what the sets of the tile's pairs have in common.
  void count(const Tile& tile) {
    tile_ = tile;
    for (int64_t j = 0; j < tile.cols; ++j) {
      col_sizes_[j] = static_cast<Count>(prepared_.col_sizes[tile.col + j]);
    }
    const int64_t steps = prepared_.steps;
    // A count of 16 bits is written once; of several pieces the counts are added.
    if (steps == 0 || !std::is_same_v<Count, uint16_t>) {
      std::fill(common_.begin(), common_.end(), Count{0});
    }
    for (int64_t first = 0; first < steps; first += cpu::kPieceSteps) {
      cpu::CommonJob job{prepared_.rows.data() + tile.row * steps + first,
                         steps,
                         prepared_.cols.data() + (tile.col * steps + first * kTile),
                         tile.rows,
                         std::min(cpu::kPieceSteps, steps - first),
                         nullptr};
      if constexpr (std::is_same_v<Count, uint16_t>) {
        job.common = common_.data();
        loops_.count_common(job);
      } else {
        job.common = piece_.data();
        loops_.count_common(job);
        for (int64_t i = 0; i < tile.rows * kTile; ++i) common_[i] += piece_[i];
      }
    }
  }

  cpu::CommonRow<Count> row(int64_t i) const {
    return {common_.data() + i * kTile, prepared_.row_sizes[tile_.row + i], col_sizes_, tile_.cols};
  }

  // Values of the tile, and where they differ of its reflection.
  TileValues<float> values(const Tile& tile) {
    count(tile);
    const Sets& sets = prepared_.sets;
    values_.resize(kTile * kTile);
    set_values(false, values_.data());
    if (!sets.self || is_symmetric(sets.metric)) return {values_.data(), values_.data()};
    mirror_.resize(kTile * kTile);
    set_values(true, mirror_.data());
    return {values_.data(), mirror_.data()};
  }

 private:
  void set_values(bool mirrored, float* out) const {
    for (int64_t i = 0; i < tile_.rows; ++i) {
      if constexpr (std::is_same_v<Count, uint16_t>) {
        loops_.set_values_16(prepared_.sets.metric, mirrored, row(i), out + i * kTile);
      } else {
        loops_.set_values_32(prepared_.sets.metric, mirrored, row(i), out + i * kTile);
      }
    }
  }

  const PreparedSets& prepared_;
  const cpu::SimilarityLoops& loops_;
  std::vector<Count> common_;
  std::vector<uint16_t> piece_;
  std::vector<float> values_;
  std::vector<float> mirror_;
  Count col_sizes_[kTile] = {};
  Tile tile_{};
};

// Which pairs reach a threshold.
class SetThreshold {
 public:
  SetThreshold(const PreparedSets& prepared, double threshold) : metric_(prepared.sets.metric) {
    const auto largest = [](const std::vector<int64_t>& sizes) {
      return sizes.empty() ? 0 : *std::max_element(sizes.begin(), sizes.end());
    };
    const int64_t a = largest(prepared.row_sizes), b = largest(prepared.col_sizes);
    least_.resize(a + b + 1);
    for (int64_t key = 0; key <= a + b; ++key) least_[key] = least_common(metric_, key, threshold);
    // One step below the ratio outweighs its rounding, and what is then above the product rounded
    // down is at least the ratio's product rounded up: few pairs pass that do not reach it.
    everything_ = threshold <= 0;
    const double steps = common_ratio(metric_, threshold) * 65536 - 1;
    ratio_ = static_cast<uint16_t>(std::clamp(std::floor(steps), 0.0, 65535.0));
  }

  bool is_reached(int64_t common, int64_t row_size, int64_t col_size) const {
    return common >= least_[size_key(metric_, row_size, col_size)];
  }

  // Columns from `first` on that may reach it, from their row or, of one tensor, from themselves;
  // each plus `base`.
  int64_t find(const cpu::CommonRow<uint16_t>& row, int64_t first, int64_t base,
               cpu::Found* found) const {
    if (everything_) return all(row.cols, first, base, found);
    const bool smaller = metric_ == SetMetric::overlap || metric_ == SetMetric::containment;
    return similarity_loops().find_common(row, smaller, ratio_, first, base, found);
  }
  int64_t find(const cpu::CommonRow<uint32_t>& row, int64_t first, int64_t base,
               cpu::Found* found) const {
    return all(row.cols, first, base, found);
  }

 private:
  static int64_t all(int64_t cols, int64_t first, int64_t base, cpu::Found* found) {
    for (int64_t j = first; j < cols; ++j) *found++ = static_cast<cpu::Found>(base + j);
    return std::max<int64_t>(0, cols - first);
  }

  SetMetric metric_;
  std::vector<int64_t> least_;  // by the key of the sizes
  uint16_t ratio_;
  bool everything_;
};

// Rows of a tile that are counted before their edges are looked for: counts stay in the first
// cache, and one loop goes over the candidates of all, because a loop for each row's few would end
// where no branch predictor expects it.
constexpr int64_t kStripe = 16;
static_assert(kStripe * kTile <= 65536, "a pair of a stripe has a number of 16 bits");

template <typename Count>
EdgeTensors find_set_edges(const PreparedSets& prepared, double threshold) {
  const Sets& sets = prepared.sets;
  const at::TensorOptions options = sets.a.options().dtype(at::kFloat);
  EdgeParts<float> parts;
  // No similarity is above 1.
  if (threshold > 1) return parts.sorted(options);
  const SetThreshold limit(prepared, threshold);
  const bool reflected = sets.self && !is_symmetric(sets.metric);
  visit_tiles(TileGrid(sets.rows, sets.cols, sets.self), [&] {
    return [&, counter = SetTile<Count>(prepared), edges = EdgeParts<float>::Edges(),
            reflection = EdgeParts<float>::Edges()](const Tile& tile) mutable {
      edges.clear();
      reflection.clear();
      cpu::Found found[kStripe * kTile + cpu::kFound - kTile];
      for (int64_t first = 0; first < tile.rows; first += kStripe) {
        const int64_t rows = std::min(kStripe, tile.rows - first);
        counter.count({tile.row + first, tile.col, rows, tile.cols});
        int64_t count = 0;
        for (int64_t i = 0; i < rows; ++i) {
          count += limit.find(counter.row(i), first_partner(tile, first + i, sets.self), i * kTile,
                              found + count);
        }
        for (int64_t f = 0; f < count; ++f) {
          const int64_t i = found[f] / kTile, j = found[f] % kTile;
          const cpu::CommonRow<Count> row = counter.row(i);
          const auto add = [&](EdgeParts<float>::Edges& to, int64_t from_row, int64_t from_col,
                               int64_t row_size, int64_t col_size) {
            if (!limit.is_reached(row.common[j], row_size, col_size)) return;
            const double value = set_similarity(sets.metric, row.common[j], row_size, col_size);
            to.push_back({static_cast<uint16_t>(from_row), static_cast<uint16_t>(from_col),
                          static_cast<float>(value)});
          };
          add(edges, first + i, j, row.row_size, row.col_sizes[j]);
          if (reflected) add(reflection, j, first + i, row.col_sizes[j], row.row_size);
        }
      }
      parts.add(tile.row, tile.col, edges);
      parts.add(tile.col, tile.row, reflection);
    };
  });
  return parts.sorted(options);
}

// Calls run(Count{}) with the type that counts fit into.
template <typename Run>
auto with_count_type(const PreparedSets& prepared, Run run) {
  return prepared.steps <= cpu::kPieceSteps ? run(uint16_t{}) : run(uint32_t{});
}

at::Tensor bitset_similarity_cpu(const at::Tensor& a, const OptionalTensor& b,
                                 std::string_view metric) {
  const Sets sets = checked_sets("bitset_similarity", a, b, metric);
  const PreparedSets prepared(sets);
  at::Tensor out = at::empty({sets.rows, sets.cols}, sets.a.options().dtype(at::kFloat));
  float* result = out.mutable_data_ptr<float>();
  with_count_type(prepared, [&](auto count) {
    visit_tiles(TileGrid(sets.rows, sets.cols, sets.self), [&] {
      return [&, counter = SetTile<decltype(count)>(prepared)](const Tile& tile) mutable {
        write_tile(tile, counter.values(tile), sets.self, sets.cols, result);
      };
    });
    return 0;
  });
  return out;
}

EdgeTensors bitset_similarity_edges_cpu(const at::Tensor& a, const OptionalTensor& b,
                                        std::string_view metric, double threshold) {
  const char* op = "bitset_similarity_edges";
  const Sets sets = checked_sets(op, a, b, metric);
  check_threshold(op, threshold);
  const PreparedSets prepared(sets);
  return with_count_type(
      prepared, [&](auto count) { return find_set_edges<decltype(count)>(prepared, threshold); });
}

NeighbourTensors bitset_similarity_topk_cpu(const at::Tensor& a, const OptionalTensor& b,
                                            std::string_view metric, int64_t k) {
  const char* op = "bitset_similarity_topk";
  const Sets sets = checked_sets(op, a, b, metric);
  check_k(op, k);
  const PreparedSets prepared(sets);
  return with_count_type(prepared, [&](auto count) {
    return find_nearest<float>(TileGrid(sets.rows, sets.cols, sets.self), sets.rows, sets.cols, k,
                               sets.self, sets.a.options().dtype(at::kFloat), [&] {
                                 return
                                     [counter = SetTile<decltype(count)>(prepared)](
                                         const Tile& tile) mutable { return counter.values(tile); };
                               });
  });
}

}  // namespace
}  // namespace neusemslice::ops

TORCH_LIBRARY_IMPL(neusemslice, CPU, m) {
  m.impl("bitset_pack", &neusemslice::ops::bitset_pack_cpu);
  m.impl("bitset_similarity", &neusemslice::ops::bitset_similarity_cpu);
  m.impl("bitset_similarity_edges", &neusemslice::ops::bitset_similarity_edges_cpu);
  m.impl("bitset_similarity_topk", &neusemslice::ops::bitset_similarity_topk_cpu);
}
