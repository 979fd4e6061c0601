// Sums of products of sixteen neurons side by side: the inner loops of contribution_, compiled once
// per instruction set; see lanes.h for how it is included. All is in float64, in which a product of
// narrower values is exact; memory is slower still. The order and the grouping of all sums are
// fixed by the data's shape and layout alone, so neither threads nor register width show in the
// result.

constexpr int kGroup = 4;           // rows of each input that are added in registers
constexpr int kPlanesAhead = 3;     // planes between prefetch and use
constexpr int64_t kStepsAhead = 8;  // steps between prefetch and use

// Sums of sixteen neurons over one sample's positions, or over one class's samples.
struct alignas(64) ProductSums {
  double sum[kStep];
  double abs[kStep];

  void clear() { *this = {}; }
};

// One row of each input, and the weight of its sample.
template <typename X, typename G>
struct Row {
  const X* x;
  const G* g;
  double weight;
};

// Sixteen elements in float64.
template <typename T>
NSS_INLINE Lanes<double> load_wide(const T* p) {
#if NSS_LANE_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    // Converted as they are read: no register is taken apart.
    using Wide = Lanes<double>::Register;
    Lanes<double> w;
    NSS_EACH(2, w.r[i] = (Wide)_mm512_cvtps_pd(_mm256_loadu_ps(p + 8 * i)));
    return w;
  }
#endif
  return widen(load_lanes(p));
}

template <typename X, typename G>
NSS_INLINE Lanes<double> products(const X* x, const G* g) {
  return load_wide(x) * load_wide(g);
}

// What rows are: positions of one sample, whose absolute value is not known yet, or samples.
enum class RowsOf { kPositions, kSamples, kWeightedSamples };

// Asks for a row's lines that begin in a step.
template <typename T>
NSS_INLINE void prefetch_step(const T* row, int64_t step) {
  constexpr int64_t kBytes = sizeof(T) * kStep;
  if constexpr (kBytes < 64) {
    if (step % (64 / kBytes) != 0) return;
  }
  for (int64_t byte = 0; byte < kBytes; byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(row + step * kStep) + byte);
  }
}

// Adds R rows of `steps` times sixteen neurons to `sums`. `next` is where the reader goes after
// them.
template <RowsOf Kind, int R, typename X, typename G>
void add_rows(const Row<X, G>* rows, const Row<X, G>* next, int64_t steps, ProductSums* sums) {
  for (int64_t j = 0; j < steps; ++j, ++sums) {
    const bool same = j + kStepsAhead < steps;
    const Row<X, G>* from = same ? rows : next;
    const int64_t ahead = same ? j + kStepsAhead : std::min(j + kStepsAhead - steps, steps - 1);
    for (int r = 0; r < R; ++r) {
      prefetch_step(from[r].x, ahead);
      prefetch_step(from[r].g, ahead);
    }
    Lanes<double> sum, abs;
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      constexpr bool kFirst = decltype(r)::value == 0;
      const Lanes<double> product = products(rows[r].x + j * kStep, rows[r].g + j * kStep);
      const Lanes<double> part =
          Kind == RowsOf::kWeightedSamples ? product * rows[r].weight : product;
      add<kFirst>(sum, part);
      if constexpr (Kind != RowsOf::kPositions) add<kFirst>(abs, part.magnitude());
    });
    add_to(sums->sum, sum);
    if constexpr (Kind != RowsOf::kPositions) add_to(sums->abs, abs);
  }
}

// Adds rows [0, count) in groups. `row(i)` is row i; beyond `count` it is where the reader will go
// next.
template <RowsOf Kind, typename X, typename G, typename F>
void add_all_rows(int64_t count, const F& row, int64_t steps, ProductSums* sums) {
  Row<X, G> rows[2 * kGroup];
  int64_t i = 0;
  const auto add = [&](auto group) {
    constexpr int kRows = decltype(group)::value;
    for (int r = 0; r < 2 * kRows; ++r) rows[r] = row(i + r);
    add_rows<Kind, kRows>(rows, rows + kRows, steps, sums);
    i += kRows;
  };
  while (i + 4 <= count) add(std::integral_constant<int, 4>{});
  if (i + 2 <= count) add(std::integral_constant<int, 2>{});
  if (i < count) add(std::integral_constant<int, 1>{});
}

// Sum over the positions of one neuron, which lie side by side in both inputs. Sixteen columns;
// what is left of the last row is read again with its end, and then dropped. `ahead_x` and
// `ahead_g` are planes that are read soon.
template <typename X, typename G>
double dot_plane(const X* x, const G* g, int64_t positions, const X* ahead_x, const G* ahead_g) {
  if (positions < kStep) {
    double sum = 0;
    for (int64_t p = 0; p < positions; ++p) {
      sum += static_cast<double>(to_value(x[p])) * static_cast<double>(to_value(g[p]));
    }
    return sum;
  }
  Lanes<double> sum{};
  int64_t p = 0;
  for (; p + kStep <= positions; p += kStep) {
    prefetch_step(ahead_x, p / kStep);
    prefetch_step(ahead_g, p / kStep);
    sum += products(x + p, g + p);
  }
  if (p < positions) {
    const int64_t last = positions - kStep;
    sum += products(x + last, g + last).without_first(p - last);
  }
  return sum.total();
}
