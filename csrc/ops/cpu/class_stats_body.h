// The inner loops of class_stats_, compiled once per instruction set; see lanes.h for how it is
// included, and class_stats_job.h for what it is given. The order and the grouping of all sums are
// fixed by the data's shape alone, so neither threads nor register width show in the result.
//
// Rows of sixteen neurons are added in groups of eight, four, two and one: within a group in
// registers, then into float64. Within a group float32 and float16 keep their plain sum in float64
// and the rest in float32 (absolute values and squared deviations have one sign: nothing cancels);
// bfloat16's plain sum is in float32 too, where eight values of 8 digits almost always fit exactly.
//
// Values that are not finite are not looked for on the way. They leave the sums of their class not
// finite, and those sixteen neurons of that class are then added again from cleaned copies.

enum Statistic : unsigned { kMean = 1, kM2 = 2, kMeanAbs = 4, kMax = 8, kActive = 16 };

constexpr int kGroup = 8;            // rows that are added in registers
constexpr int64_t kAhead = 8;        // steps between prefetch and use
constexpr int64_t kChunkSteps = 64;  // whose accumulators stay near the first-level cache

template <typename T>
using ValueOf = decltype(to_value(T{}));

// Sums over rows, of sixteen neurons. `squares` is of deviations from `shift`.
template <typename V>
struct alignas(64) RowSums {
  double sum[kStep];
  double squares[kStep];
  double abs[kStep];
  double active[kStep];
  V max[kStep];
  V shift[kStep];

  void clear() {
    for (int i = 0; i < kStep; ++i) {
      sum[i] = squares[i] = abs[i] = active[i] = 0;
      max[i] = -std::numeric_limits<V>::infinity();
      shift[i] = 0;
    }
  }
};

// Sums over one class's samples, of sixteen neurons; `sum` and `squares` are of the pooled
// activations' deviations from `shift`, the rest over positions.
template <typename V>
struct alignas(64) ClassSums {
  double shift[kStep];
  double sum[kStep];
  double squares[kStep];
  double abs[kStep];
  double active[kStep];
  V max[kStep];

  void clear() {
    for (int i = 0; i < kStep; ++i) {
      shift[i] = sum[i] = squares[i] = abs[i] = active[i] = 0;
      max[i] = -std::numeric_limits<V>::infinity();
    }
  }
};

template <bool First, typename V>
NSS_INLINE void add(Lanes<V>& total, const Lanes<V>& part) {
  if constexpr (First) {
    total = part;
  } else {
    total += part;
  }
}

NSS_INLINE void add_to(double* total, const Lanes<double>& part) {
  (Lanes<double>::load(total) + part).store(total);
}

// Adds R rows of `steps` times sixteen neurons to `sums`. `next` is where the reader goes after
// them.
template <typename T, unsigned M, int R>
void add_rows(const T* const* rows, const T* const* next, int64_t steps,
              RowSums<ValueOf<T>>* sums) {
  using V = ValueOf<T>;
  constexpr bool kWideSum = !std::is_same_v<T, BFloat16>;
  constexpr int kLines = sizeof(T) * kStep >= 64 ? sizeof(T) * kStep / 64 : 1;
  constexpr int64_t kStepsPerLine = sizeof(T) * kStep >= 64 ? 1 : 64 / (sizeof(T) * kStep);
  for (int64_t j = 0; j < steps; ++j, ++sums) {
    if (j % kStepsPerLine == 0) {
      const bool same = j + kAhead < steps;
      const T* const* from = same ? rows : next;
      const int64_t at = (same ? j + kAhead : std::min(j + kAhead - steps, steps - 1)) * kStep;
      for (int r = 0; r < R; ++r) {
        for (int line = 0; line < kLines; ++line) {
          __builtin_prefetch(reinterpret_cast<const char*>(from[r] + at) + 64 * line);
        }
      }
    }
    Lanes<double> wide_sum;
    Lanes<V> sum, squares, abs, max;
    Counts<V> active;
    const Lanes<V> shift = M & kM2 ? Lanes<V>::load(sums->shift) : Lanes<V>{};
    if constexpr (M & kMax) max = Lanes<V>::load(sums->max);
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      constexpr bool kFirst = decltype(r)::value == 0;
      const T* p = rows[r] + j * kStep;
      const Lanes<V> x = load_lanes(p);
      if constexpr (M & kMax) max = max.max(x);
      if constexpr (M & kActive) active.add_positive(x);
      if constexpr ((M & kMean) && kWideSum) add<kFirst>(wide_sum, load_wide(p));
      if constexpr ((M & kMean) && !kWideSum) add<kFirst>(sum, x);
      if constexpr (M & kM2) add<kFirst>(squares, (x - shift) * (x - shift));
      if constexpr (M & kMeanAbs) add<kFirst>(abs, x.magnitude());
    });
    if constexpr ((M & kMean) && kWideSum) add_to(sums->sum, wide_sum);
    if constexpr ((M & kMean) && !kWideSum) add_to(sums->sum, widen(sum));
    if constexpr (M & kM2) add_to(sums->squares, widen(squares));
    if constexpr (M & kMeanAbs) add_to(sums->abs, widen(abs));
    if constexpr (M & kActive) add_to(sums->active, widen(active.values()));
    if constexpr (M & kMax) max.store(sums->max);
  }
}

// add_rows for one mask of statistics.
template <typename T>
struct RowAdder {
  using Add = void(const T* const*, const T* const*, int64_t, RowSums<ValueOf<T>>*);
  Add* eight;
  Add* four;
  Add* two;
  Add* one;

  // Adds rows [0, count) in groups. `row(i)` is where row i lies; beyond `count` it is where the
  // reader will go next.
  template <typename Row>
  void operator()(int64_t count, const Row& row, int64_t steps, RowSums<ValueOf<T>>* sums) const {
    const T* rows[2 * kGroup];
    int64_t i = 0;
    const auto add = [&](Add* group, int size) {
      for (int r = 0; r < 2 * size; ++r) rows[r] = row(i + r);
      group(rows, rows + size, steps, sums);
      i += size;
    };
    while (i + 8 <= count) add(eight, 8);
    if (i + 4 <= count) add(four, 4);
    if (i + 2 <= count) add(two, 2);
    if (i < count) add(one, 1);
  }
};

// The selections of statistics that have code of their own, narrowest first; any other takes the
// first that holds it. The mean is in all of them: its sum shows whether a value was not finite.
constexpr unsigned kSelections[] = {kMean, kMean | kM2, kMean | kMeanAbs,
                                    kMean | kMeanAbs | kMax | kActive,
                                    kMean | kM2 | kMeanAbs | kMax | kActive};

constexpr int selection_for(unsigned mask) {
  int i = 0;
  while (mask & ~kSelections[i]) ++i;
  return i;
}

template <typename T>
RowAdder<T> row_adder(unsigned mask) {
  static constexpr auto adder = []<unsigned M>(std::integral_constant<unsigned, M>) {
    return RowAdder<T>{&add_rows<T, M, 8>, &add_rows<T, M, 4>, &add_rows<T, M, 2>,
                       &add_rows<T, M, 1>};
  };
  static constexpr auto adders = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array{adder(std::integral_constant<unsigned, kSelections[I]>{})...};
  }(std::make_integer_sequence<int, std::size(kSelections)>{});
  return adders[selection_for(mask)];
}

inline unsigned selected_statistics(const ClassState& s) {
  const auto bit = [](const void* plane, unsigned statistic) { return plane ? statistic : 0u; };
  return bit(s.mean, kMean) | bit(s.m2, kM2) | bit(s.mean_abs, kMeanAbs) | bit(s.max, kMax) |
         bit(s.active, kActive);
}

// Sums over the positions of one neuron, which lie side by side: sixteen columns, and what is left.
struct PlaneSums {
  double sum = 0;
  double abs = 0;
  double active = 0;
  double max = -std::numeric_limits<double>::infinity();
};

template <typename T, unsigned M>
PlaneSums add_plane(const T* plane, int64_t positions) {
  using V = ValueOf<T>;
  Lanes<double> sum{}, abs{};
  Lanes<V> max = Lanes<V>::all(-std::numeric_limits<V>::infinity());
  Counts<V> active;
  int64_t p = 0;
  while (p + kStep <= positions) {
    // Absolute values go into float64 every eight rows, as in add_rows.
    Lanes<V> group{};
    const int64_t end = std::min(p + kGroup * kStep, positions - kStep + 1);
    for (; p < end; p += kStep) {
      const Lanes<V> x = load_lanes(plane + p);
      if constexpr (M & kMean) sum += load_wide(plane + p);
      if constexpr (M & kMeanAbs) group += x.magnitude();
      if constexpr (M & kMax) max = max.max(x);
      if constexpr (M & kActive) active.add_positive(x);
    }
    if constexpr (M & kMeanAbs) abs += widen(group);
  }
  PlaneSums sums;
  if constexpr (M & kMean) sums.sum = sum.total();
  if constexpr (M & kMeanAbs) sums.abs = abs.total();
  if constexpr (M & kActive) sums.active = widen(active.values()).total();
  if constexpr (M & kMax) sums.max = max.largest();
  for (; p < positions; ++p) {
    const double value = to_value(plane[p]);
    sums.sum += value;
    sums.abs += std::abs(value);
    sums.active += value > 0 ? 1 : 0;
    sums.max = value > sums.max ? value : sums.max;
  }
  return sums;
}

template <typename T>
using AddPlane = PlaneSums(const T* plane, int64_t positions);

template <typename T>
AddPlane<T>* plane_adder(unsigned mask) {
  static constexpr auto adders = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array{&add_plane<T, kSelections[I] & ~kM2>...};
  }(std::make_integer_sequence<int, std::size(kSelections)>{});
  return adders[selection_for(mask)];
}

// What one class's samples say of sixteen neurons, ready to be merged.
template <typename V>
struct Cells {
  Lanes<double> shift, sum, squares, abs, active;
  Lanes<V> max;
};

template <typename T>
class Accumulator {
  using V = ValueOf<T>;

 public:
  explicit Accumulator(const ClassJob& job)
      : job_(job),
        x_(static_cast<const T*>(job.x)),
        selected_(selected_statistics(job.state)),
        add_samples_(row_adder<T>(selected_)),
        add_positions_(row_adder<T>(selected_ & ~kM2)),
        add_plane_(plane_adder<T>(selected_ & ~kM2)),
        // One row per sample, and each counts once: its rows can be added without a look at it.
        direct_(job.positions == 1 && !job.weighted),
        rows_(job.stride_c == 1 || job.positions == 1) {}

  void run(int64_t first, int64_t last) {
    const int64_t whole = (last - first) / kStep;
    for (int64_t k = 0; k < job_.state.num_classes; ++k) {
      if (job_.offsets[k] == job_.offsets[k + 1]) continue;
      if (job_.stride_c != 1 || !rows_) {
        for (int64_t c = first; c < last; c += kStep) {
          add_step(k, c, std::min(kStep, last - c));
        }
        continue;
      }
      for (int64_t s = 0; s < whole; s += kChunkSteps) {
        const int64_t c = first + s * kStep;
        const int64_t steps = std::min(kChunkSteps, whole - s);
        const bool more = s + steps < whole;
        direct_ ? add_direct(k, c, steps, more ? c + steps * kStep : -1, first)
                : add_sample_rows(k, c, steps);
      }
      if (const int64_t c = first + whole * kStep; c < last) add_step(k, c, last - c);
    }
  }

 private:
  const T* at(const Sample& s, int64_t p, int64_t c) const {
    const int64_t position = job_.kept ? job_.kept[s.kept + p] : p;
    return x_ + s.index * job_.stride_n + position * job_.stride_p + c * job_.stride_c;
  }

  bool known(int64_t k) const { return (selected_ & kMean) && job_.state.count[k] > 0; }

  // Whole rows of one class, where a sample is a row.
  void add_direct(int64_t k, int64_t c, int64_t steps, int64_t next_chunk, int64_t first) {
    const int64_t begin = job_.offsets[k], end = job_.offsets[k + 1];
    const int64_t all = job_.offsets[job_.state.num_classes];
    const auto row = [&](int64_t i) {
      int64_t sample = begin + i, neuron = c;
      if (sample >= end) {
        neuron = next_chunk >= 0 ? next_chunk : first;
        sample =
            next_chunk >= 0 ? std::min(sample - end + begin, end - 1) : std::min(sample, all - 1);
      }
      return at(job_.samples[sample], 0, neuron);
    };
    for (int64_t s = 0; s < steps; ++s)
      start(k, c + s * kStep, kStep, row(0) + s * kStep, chunk_[s]);
    add_samples_(end - begin, row, steps, chunk_);
    for (int64_t s = 0; s < steps; ++s) finish(k, c + s * kStep, kStep, chunk_[s]);
  }

  // Whole rows of one class, where a sample has several positions or a weight.
  void add_sample_rows(int64_t k, int64_t c, int64_t steps) {
    const int64_t begin = job_.offsets[k], end = job_.offsets[k + 1];
    for (int64_t s = 0; s < steps; ++s) classes_[s].clear();
    for (int64_t n = begin; n < end; ++n) {
      const Sample& sample = job_.samples[n];
      const Sample& following = job_.samples[std::min(n + 1, end - 1)];
      const auto row = [&](int64_t i) {
        return i < sample.positions
                   ? at(sample, i, c)
                   : at(following, std::min(i - sample.positions, following.positions - 1), c);
      };
      for (int64_t s = 0; s < steps; ++s) chunk_[s].clear();
      add_positions_(sample.positions, row, steps, chunk_);
      for (int64_t s = 0; s < steps; ++s) {
        fold(k, c + s * kStep, kStep, sample, n == begin, chunk_[s], classes_[s]);
      }
    }
    for (int64_t s = 0; s < steps; ++s) finish(k, c + s * kStep, kStep, classes_[s]);
  }

  // Up to sixteen neurons of one class, whatever their strides.
  void add_step(int64_t k, int64_t c, int64_t width) {
    if (direct_) {
      RowSums<V> sums;
      gather_direct<false>(k, c, width, sums);
      finish(k, c, width, sums);
    } else {
      ClassSums<V> sums;
      gather_samples<false>(k, c, width, sums);
      finish(k, c, width, sums);
    }
  }

  // Copies one value; where `Clean`, one that is not finite becomes 0 and is counted.
  template <bool Clean>
  T take(const T* p, int64_t c, V& max) {
    if constexpr (Clean) {
      const V value = to_value(*p);
      if (!is_finite(value)) {
        ++job_.state.nonfinite[c];
        return T{};
      }
      max = value > max ? value : max;
    }
    return *p;
  }

  // As add_direct and add_sample_rows, from copies. Where `Clean`, zeros that stand for values that
  // are not finite must not enter the maximum, which is therefore found while copying.
  template <bool Clean>
  void gather_direct(int64_t k, int64_t c, int64_t width, RowSums<V>& sums) {
    const int64_t begin = job_.offsets[k], end = job_.offsets[k + 1];
    V max[kStep];
    std::fill_n(max, kStep, -std::numeric_limits<V>::infinity());
    T copies[2 * kGroup][kStep] = {};
    T first[kStep] = {};
    for (int64_t i = 0; i < width; ++i) first[i] = *at(job_.samples[begin], 0, c + i);
    start(k, c, width, first, sums);
    for (int64_t n = begin; n < end; n += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, end - n);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          copies[r][i] = take<Clean>(at(job_.samples[n + r], 0, c + i), c + i, max[i]);
        }
      }
      add_samples_(count, [&](int64_t i) { return copies[i]; }, 1, &sums);
    }
    if constexpr (Clean) std::copy_n(max, kStep, sums.max);
  }

  template <bool Clean>
  void gather_samples(int64_t k, int64_t c, int64_t width, ClassSums<V>& sums) {
    const int64_t begin = job_.offsets[k], end = job_.offsets[k + 1];
    V max[kStep];
    std::fill_n(max, kStep, -std::numeric_limits<V>::infinity());
    sums.clear();
    for (int64_t n = begin; n < end; ++n) {
      const Sample& sample = job_.samples[n];
      RowSums<V> row_sums;
      row_sums.clear();
      if (rows_) {
        gather_rows<Clean>(sample, c, width, max, row_sums);
      } else {
        gather_planes<Clean>(sample, c, width, max, row_sums);
      }
      fold(k, c, width, sample, n == begin, row_sums, sums);
    }
    if constexpr (Clean) std::copy_n(max, kStep, sums.max);
  }

  template <bool Clean>
  void gather_rows(const Sample& sample, int64_t c, int64_t width, V* max, RowSums<V>& sums) {
    T copies[2 * kGroup][kStep] = {};
    for (int64_t p = 0; p < sample.positions; p += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, sample.positions - p);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          copies[r][i] = take<Clean>(at(sample, p + r, c + i), c + i, max[i]);
        }
      }
      add_positions_(count, [&](int64_t i) { return copies[i]; }, 1, &sums);
    }
  }

  // Each neuron's positions lie together, or are copied so that they do.
  template <bool Clean>
  void gather_planes(const Sample& sample, int64_t c, int64_t width, V* max, RowSums<V>& sums) {
    const bool copy = Clean || job_.stride_p != 1 || job_.kept;
    if (copy && plane_.size() < static_cast<size_t>(sample.positions)) {
      plane_.resize(sample.positions);
    }
    for (int64_t i = 0; i < width; ++i) {
      const T* plane = copy ? plane_.data() : at(sample, 0, c + i);
      if (copy) {
        for (int64_t p = 0; p < sample.positions; ++p) {
          plane_[p] = take<Clean>(at(sample, p, c + i), c + i, max[i]);
        }
      }
      const PlaneSums found = add_plane_(plane, sample.positions);
      sums.sum[i] = found.sum;
      sums.abs[i] = found.abs;
      sums.active[i] = found.active;
      sums.max[i] = static_cast<V>(found.max);
    }
  }

  // Empty sums of class k. Any shift near the mean will do, as long as it is a finite V.
  void start(int64_t k, int64_t c, int64_t width, const T* first_row, RowSums<V>& sums) const {
    sums.clear();
    const Lanes<V> shift = known(k) ? narrow<V>(load_mean(k, c, width)) : load_lanes(first_row);
    shift.zero_unless_finite().store(sums.shift);
  }

  Lanes<double> load_mean(int64_t k, int64_t c, int64_t width) const {
    return Lanes<double>::load(job_.state.mean + k * job_.state.neurons + c, width);
  }

  // Adds one sample's sums over positions to those of its class.
  void fold(int64_t k, int64_t c, int64_t width, const Sample& sample, bool begins,
            const RowSums<V>& row, ClassSums<V>& sums) const {
    const double positions = static_cast<double>(sample.positions);
    const double w = sample.weight;
    const Lanes<double> pooled = Lanes<double>::load(row.sum) / positions;
    if (begins) {
      const Lanes<double> shift = known(k) ? load_mean(k, c, width) : pooled;
      shift.zero_unless_finite().store(sums.shift);
    }
    const Lanes<double> deviation = pooled - Lanes<double>::load(sums.shift);
    const Lanes<double> weighted = deviation * w;
    add_to(sums.sum, weighted);
    add_to(sums.squares, weighted * deviation);
    add_to(sums.abs, Lanes<double>::load(row.abs) * w);
    add_to(sums.active, Lanes<double>::load(row.active) * w);
    Lanes<V>::load(sums.max).max(Lanes<V>::load(row.max)).store(sums.max);
  }

  template <typename Sums>
  bool all_finite(const Sums& sums) const {
    return Lanes<double>::load(sums.sum).all_finite();
  }

  void finish(int64_t k, int64_t c, int64_t width, ClassSums<V>& sums) {
    if (!all_finite(sums)) gather_samples<true>(k, c, width, sums);
    merge(k, c, width,
          {Lanes<double>::load(sums.shift), Lanes<double>::load(sums.sum),
           Lanes<double>::load(sums.squares), Lanes<double>::load(sums.abs),
           Lanes<double>::load(sums.active), Lanes<V>::load(sums.max)});
  }

  void finish(int64_t k, int64_t c, int64_t width, RowSums<V>& rows) {
    if (!all_finite(rows)) gather_direct<true>(k, c, width, rows);
    const Lanes<double> shift = widen(Lanes<V>::load(rows.shift));
    const Lanes<double> sum = Lanes<double>::load(rows.sum) - shift * job_.class_weight[k];
    if (std::is_same_v<V, float> && (selected_ & kM2)) square_again(k, c, width, sum, rows);
    merge(k, c, width,
          {shift, sum, Lanes<double>::load(rows.squares), Lanes<double>::load(rows.abs),
           Lanes<double>::load(rows.active), Lanes<V>::load(rows.max)});
  }

  // Squares that float32 cannot hold are summed again in float64.
  NSS_INLINE void square_again(int64_t k, int64_t c, int64_t width, const Lanes<double>& sum,
                               RowSums<V>& sums) const {
    constexpr double kSmallest = 0x1p-80, kLargest = std::numeric_limits<float>::max();
    // The square of the sum, at most n times the sum of squares, stays where that has vanished.
    const Lanes<double> seen = Lanes<double>::load(sums.squares) + sum * sum;
    if (seen.all_zero_or_within(kSmallest, kLargest)) return;
    for (int64_t i = 0; i < width; ++i) sums.squares[i] = exact_squares(k, c + i, sums.shift[i]);
  }

  double exact_squares(int64_t k, int64_t c, double shift) const {
    double squares = 0;
    for (int64_t n = job_.offsets[k]; n < job_.offsets[k + 1]; ++n) {
      const double value = to_value(*at(job_.samples[n], 0, c));
      const double deviation = (is_finite(value) ? value : 0) - shift;
      squares += deviation * deviation;
    }
    return squares;
  }

  // Chan, Golub, LeVeque (1979), as in common/moments.h, with the divisions taken out of the loop.
  NSS_INLINE void merge(int64_t k, int64_t c, int64_t width, const Cells<V>& cells) const {
    const ClassState& state = job_.state;
    const int64_t at = k * state.neurons + c;
    const double weight = job_.class_weight[k];
    const double share = weight / (state.count[k] + weight);
    const double between = state.count[k] * share;
    const double positions = job_.class_positions[k];
    const double position_share = positions / (state.positions[k] + positions);
    if (selected_ & kMean) {
      const Lanes<double> deviation = cells.sum * (1 / weight);
      const Lanes<double> old = Lanes<double>::load(state.mean + at, width);
      const Lanes<double> delta = cells.shift + deviation - old;
      (old + delta * share).store(state.mean + at, width);
      if (selected_ & kM2) {
        const Lanes<double> within = cells.squares - cells.sum * deviation;
        const Lanes<double> m2 = Lanes<double>::load(state.m2 + at, width) +
                                 within.max(Lanes<double>{}) + delta * (delta * between);
        m2.store(state.m2 + at, width);
      }
    }
    const auto merge_share = [&](float* plane, const Lanes<double>& found) {
      const Lanes<double> old = widen(Lanes<float>::load(plane + at, width));
      const Lanes<double> now = found * (1 / positions);
      narrow<float>(old + (now - old) * position_share).store(plane + at, width);
    };
    if (selected_ & kMeanAbs) merge_share(state.mean_abs, cells.abs);
    if (selected_ & kActive) merge_share(state.active, cells.active);
    if (selected_ & kMax) {
      const Lanes<float> found = narrow<float>(widen(cells.max));
      Lanes<float>::load(state.max + at, width).max(found).store(state.max + at, width);
    }
  }

  const ClassJob& job_;
  const T* x_;
  unsigned selected_;
  RowAdder<T> add_samples_;
  RowAdder<T> add_positions_;
  AddPlane<T>* add_plane_;
  bool direct_;
  bool rows_;
  std::vector<T> plane_;
  RowSums<V> chunk_[kChunkSteps];
  ClassSums<V> classes_[kChunkSteps];
};

void accumulate(const ClassJob& job, int64_t first, int64_t last) {
  switch (job.element) {
    case Element::kFloat64:
      return Accumulator<double>(job).run(first, last);
    case Element::kFloat32:
      return Accumulator<float>(job).run(first, last);
    case Element::kFloat16:
      return Accumulator<Float16>(job).run(first, last);
    case Element::kBFloat16:
      return Accumulator<BFloat16>(job).run(first, last);
  }
}
