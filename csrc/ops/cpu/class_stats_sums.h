// Sums of sixteen neurons side by side: the inner loops of class_stats_, compiled once per
// instruction set; see lanes.h for how it is included. The order and the grouping of all sums are
// fixed by the data's shape alone, so neither threads nor register width show in the result.
//
// Up to eight rows (sixteen of a plane) are added in registers, in the type that the values are
// computed in (float32 unless they are float64), then into float64. Rows are added as deviations
// from a value near their mean, so that nothing cancels in their squares. Sixteen rows would take a
// tenth less time in cache, but lose half a digit and overflow sooner.

constexpr int kGroup = 8;        // rows that are added in registers
constexpr int kPlaneGroup = 16;  // rows of a plane that are
constexpr int kPlanesAhead = 3;  // planes between prefetch and use

// Sums of sixteen neurons over rows, or over one class's samples. `sum` and `squares` are of
// deviations from `shift`.
template <typename V>
struct alignas(64) Sums {
  double sum[kStep];
  double squares[kStep];
  double abs[kStep];
  double active[kStep];
  V max[kStep];
  V shift[kStep];

  // Empties all but the shift.
  void clear() {
    for (int i = 0; i < kStep; ++i) {
      sum[i] = squares[i] = abs[i] = active[i] = 0;
      max[i] = -std::numeric_limits<V>::infinity();
    }
  }
};

// Asks for R rows line by line, in the order in which they lie: memory answers that faster than the
// order in which they are used.
template <typename T, int R>
class RowsAhead {
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kEachStep = (R * sizeof(T) * kStep + kLine - 1) / kLine;

 public:
  RowsAhead(const T* const* rows, int64_t steps)
      : rows_(rows), bytes_(steps * kStep * static_cast<int64_t>(sizeof(T))) {}

  // A step's share.
  NSS_INLINE void ask() {
    for (int64_t i = 0; i < kEachStep && row_ < R; ++i) {
      __builtin_prefetch(reinterpret_cast<const char*>(rows_[row_]) + at_, 0, 2);
      if ((at_ += kLine) >= bytes_) {
        at_ = 0;
        ++row_;
      }
    }
  }

 private:
  const T* const* rows_;
  int64_t bytes_;
  int64_t row_ = 0;
  int64_t at_ = 0;
};

// Adds R rows of `steps` times sixteen neurons to `sums`. `next` is where the reader goes after
// them.
template <typename T, unsigned M, int R>
void add_rows(const T* const* rows, const T* const* next, int64_t steps, Sums<ValueOf<T>>* sums) {
  using V = ValueOf<T>;
  RowsAhead<T, R> ahead(next, steps);
  for (int64_t j = 0; j < steps; ++j, ++sums) {
    ahead.ask();
    Lanes<V> sum, squares, abs, max;
    Counts<V> active;
    const Lanes<V> shift = Lanes<V>::load(sums->shift);
    if constexpr (M & kMax) max = Lanes<V>::load(sums->max);
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      constexpr bool kFirst = decltype(r)::value == 0;
      const T* p = rows[r] + j * kStep;
      const Lanes<V> x = load_lanes(p);
      if constexpr (M & kMax) max = max.max(x);
      if constexpr (M & kActive) active.add_positive(x);
      if constexpr (M & kMeanAbs) add<kFirst>(abs, x.magnitude());
      const Lanes<V> deviation = x - shift;
      add<kFirst>(sum, deviation);
      if constexpr (M & kM2) add<kFirst>(squares, deviation * deviation);
    });
    add_to(sums->sum, widen(sum));
    if constexpr (M & kM2) add_to(sums->squares, widen(squares));
    if constexpr (M & kMeanAbs) add_to(sums->abs, widen(abs));
    if constexpr (M & kActive) add_to(sums->active, widen(active.values()));
    if constexpr (M & kMax) max.store(sums->max);
  }
}

// Sums of a few rows alone, of sixteen neurons at `offset`; the shift is there already.
template <typename T, unsigned M>
void sum_rows(const T* const* rows, int64_t count, int64_t offset, Sums<ValueOf<T>>& sums) {
  using V = ValueOf<T>;
  const Lanes<V> shift = Lanes<V>::load(sums.shift);
  Lanes<V> sum{}, squares{}, abs{};
  Lanes<V> max = Lanes<V>::all(-std::numeric_limits<V>::infinity());
  Counts<V> active;
  for (int64_t r = 0; r < count; ++r) {
    const Lanes<V> x = load_lanes(rows[r] + offset);
    if constexpr (M & kMax) max = max.max(x);
    if constexpr (M & kActive) active.add_positive(x);
    if constexpr (M & kMeanAbs) abs += x.magnitude();
    const Lanes<V> deviation = x - shift;
    sum += deviation;
    if constexpr (M & kM2) squares += deviation * deviation;
  }
  widen(sum).store(sums.sum);
  widen(squares).store(sums.squares);
  widen(abs).store(sums.abs);
  widen(active.values()).store(sums.active);
  max.store(sums.max);
}

// add_rows for one mask of statistics.
template <typename T>
struct RowAdder {
  using Add = void(const T* const*, const T* const*, int64_t, Sums<ValueOf<T>>*);
  Add* eight;
  Add* four;
  Add* two;
  Add* one;
  using Sum = void(const T* const*, int64_t, int64_t, Sums<ValueOf<T>>&);
  Sum* few;

  // Adds rows [0, count) in groups. `row(i)` is where row i lies; beyond `count` it is where the
  // reader will go next.
  template <typename Row>
  void operator()(int64_t count, const Row& row, int64_t steps, Sums<ValueOf<T>>* sums) const {
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

template <typename T>
RowAdder<T> row_adder(unsigned mask) {
  static constexpr auto adder = []<unsigned M>(std::integral_constant<unsigned, M>) {
    return RowAdder<T>{&add_rows<T, M, 8>, &add_rows<T, M, 4>, &add_rows<T, M, 2>,
                       &add_rows<T, M, 1>, &sum_rows<T, M>};
  };
  static constexpr auto adders = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array{adder(std::integral_constant<unsigned, kSelections[I]>{})...};
  }(std::make_integer_sequence<int, std::size(kSelections)>{});
  return adders[selection_for(mask)];
}

// Sums over the positions of one neuron, which lie side by side.
struct PlaneSums {
  double sum = 0;
  double abs = 0;
  double active = 0;
  double max = -std::numeric_limits<double>::infinity();
};

// Sixteen columns. What is left of the last row is read again with its end, and then dropped from
// all but the maximum. `ahead` is a plane that is read soon.
template <typename T, unsigned M>
PlaneSums add_plane(const T* plane, int64_t positions, const T* ahead) {
  using V = ValueOf<T>;
  PlaneSums sums;
  if (positions < kStep) {
    for (int64_t p = 0; p < positions; ++p) {
      const double value = to_value(plane[p]);
      sums.sum += value;
      sums.abs += std::abs(value);
      sums.active += value > 0 ? 1 : 0;
      sums.max = value > sums.max ? value : sums.max;
    }
    return sums;
  }
  Lanes<double> sum{}, abs{};
  Lanes<V> max = Lanes<V>::all(-std::numeric_limits<V>::infinity());
  Lanes<V> group{}, group_abs{};
  Counts<V> active;
  const auto add_row = [&](const Lanes<V>& x) __attribute__((always_inline)) {
    group += x;
    if constexpr (M & kMeanAbs) group_abs += x.magnitude();
    if constexpr (M & kActive) active.add_positive(x);
  };
  for (int64_t p = 0; p < positions;) {
    const int64_t end = std::min(p + kPlaneGroup * kStep, positions);
    for (; p + kStep <= end; p += kStep) {
      for (size_t byte = 0; byte < sizeof(T) * kStep; byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(ahead + p) + byte);
      }
      const Lanes<V> x = load_lanes(plane + p);
      if constexpr (M & kMax) max = max.max(x);
      add_row(x);
    }
    if (p < end) {
      const Lanes<V> x = load_lanes(plane + positions - kStep);
      if constexpr (M & kMax) max = max.max(x);
      add_row(x.without_first(p + kStep - positions));
      p = positions;
    }
    sum += widen(group);
    group = {};
    if constexpr (M & kMeanAbs) {
      abs += widen(group_abs);
      group_abs = {};
    }
  }
  sums.sum = sum.total();
  if constexpr (M & kMeanAbs) sums.abs = abs.total();
  if constexpr (M & kActive) sums.active = widen(active.values()).total();
  if constexpr (M & kMax) sums.max = max.largest();
  return sums;
}

template <typename T>
using AddPlane = PlaneSums(const T* plane, int64_t positions, const T* ahead);

template <typename T>
AddPlane<T>* plane_adder(unsigned mask) {
  static constexpr auto adders = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array{&add_plane<T, kSelections[I] & ~kM2>...};
  }(std::make_integer_sequence<int, std::size(kSelections)>{});
  return adders[selection_for(mask)];
}
