// The loops of similarity_job.h. Included inside a namespace of each instruction set, after lanes.h
// and NSS_LANE_BYTES; with NSS_BITALG where 16-bit words can be counted, and chosen ones be moved
// together, by one instruction. All is integers, comparisons and single divisions, so every
// instruction set gives the same bits.

typedef uint8_t Bytes __attribute__((vector_size(NSS_LANE_BYTES)));
typedef uint16_t Words __attribute__((vector_size(NSS_LANE_BYTES)));
constexpr int64_t kWordLanes = NSS_LANE_BYTES / 2;

// ---- Common elements of sets ----

// Bits are counted per 16-bit word where an instruction does that, else per byte: by a table of the
// counts of four bits where bytes can be looked up, else by adding neighbours. Counts of bytes are
// gathered in bytes, which hold kGathered of them, and those of neighbouring bytes are then added.
#if defined(NSS_BITALG)
using Gathered = Words;
constexpr int64_t kGathered = kPieceSteps;
NSS_INLINE Gathered counted(Words bits) { return (Words)_mm512_popcnt_epi16((__m512i)bits); }
NSS_INLINE Words spread(Gathered counts) { return counts; }
#else
using Gathered = Bytes;
constexpr int64_t kGathered = 31;
NSS_INLINE Gathered counted(Words bits) {
  const Bytes bytes = (Bytes)bits;
#if NSS_LANE_BYTES == 16
  const Bytes pairs = bytes - ((Bytes)(bits >> 1) & 0x55);
  const Bytes fours = (pairs & 0x33) + ((Bytes)((Words)pairs >> 2) & 0x33);
  return (fours + (Bytes)((Words)fours >> 4)) & 0x0f;
#else
  const Bytes low = bytes & 0x0f;
  const Bytes high = (Bytes)(bits >> 4) & 0x0f;
#if NSS_LANE_BYTES == 64
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  return (Bytes)_mm512_shuffle_epi8(table, (__m512i)low) +
         (Bytes)_mm512_shuffle_epi8(table, (__m512i)high);
#else
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  return (Bytes)_mm256_shuffle_epi8(table, (__m256i)low) +
         (Bytes)_mm256_shuffle_epi8(table, (__m256i)high);
#endif
#endif
}
NSS_INLINE Words spread(Gathered counts) { return ((Words)counts & 0xff) + ((Words)counts >> 8); }
#endif

NSS_INLINE Words load_words(const uint16_t* p) {
  Words words;
  __builtin_memcpy(&words, p, sizeof(words));
  return words;
}

// Rows x registers of columns, whose counts stay in registers.
template <int kRows, int kColumns>
NSS_INLINE void count_block(const CommonJob& job, int64_t row, int64_t col) {
  const uint16_t* a = job.a + row * job.a_stride;
  const uint16_t* b = job.b + col;
  uint16_t* out = job.common + row * kTile + col;
  for (int64_t first = 0; first < job.steps; first += kGathered) {
    const int64_t last = std::min(first + kGathered, job.steps);
    Gathered sums[kRows][kColumns] = {};
    for (int64_t s = first; s < last; ++s) {
      Words cols[kColumns];
      NSS_EACH(kColumns, cols[i] = load_words(b + s * kTile + i * kWordLanes));
      unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        const Words bits = Words{} + a[r * job.a_stride + s];
        NSS_EACH(kColumns, sums[r][i] += counted(bits & cols[i]));
      });
    }
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      NSS_EACH(kColumns, uint16_t* const target = out + r * kTile + i * kWordLanes;
               Words counts = spread(sums[r][i]); if (first > 0) counts += load_words(target);
               __builtin_memcpy(target, &counts, sizeof(counts)));
    });
  }
}

// Registers: 32 of 64 bytes; 16 of the others, which also hold the table and the mask.
constexpr int kBlockRows = NSS_LANE_BYTES == 64 ? 4 : 2;
constexpr int kBlockColumns = NSS_LANE_BYTES == 64 ? 4 : 2;

void count_common(const CommonJob& job) {
  for (int64_t col = 0; col < kTile; col += kBlockColumns * kWordLanes) {
    int64_t row = 0;
    for (; row + kBlockRows <= job.rows; row += kBlockRows) {
      count_block<kBlockRows, kBlockColumns>(job, row, col);
    }
    for (; row < job.rows; ++row) count_block<1, kBlockColumns>(job, row, col);
  }
}

// ---- Values of similarity ----

// The quotient of integers below 2^24 has the bits of the float64 quotient rounded to float32,
// because float64 has more than twice the digits; larger ones take the detour.
template <typename Real, typename Count, typename Terms>
NSS_INLINE void divide(const CommonRow<Count>& row, float* values, const Terms& terms) {
  using Integer = std::conditional_t<sizeof(Count) == 2, int32_t, int64_t>;
  for (int64_t j = 0; j < row.cols; ++j) {
    const Integer common = row.common[j];
    const Integer col_size = row.col_sizes[j];
    const auto [numerator, denominator] = terms(common, col_size);
    const float value =
        static_cast<float>(static_cast<Real>(numerator) / static_cast<Real>(denominator));
    values[j] = denominator == 0 ? 0.0f : value;
  }
}

template <typename Real, typename Count>
void set_values(SetMetric metric, bool mirrored, const CommonRow<Count>& row, float* values) {
  const int64_t size = row.row_size;
  switch (metric) {
    case SetMetric::jaccard:
      return divide<Real>(row, values, [&](auto common, auto col) __attribute__((always_inline)) {
        return std::pair(common, static_cast<decltype(col)>(size + col - common));
      });
    case SetMetric::dice:
      return divide<Real>(row, values, [&](auto common, auto col) __attribute__((always_inline)) {
        return std::pair(2 * common, static_cast<decltype(col)>(size + col));
      });
    case SetMetric::overlap:
      return divide<Real>(row, values, [&](auto common, auto col) __attribute__((always_inline)) {
        return std::pair(common, size < col ? static_cast<decltype(col)>(size) : col);
      });
    case SetMetric::containment:
      return divide<Real>(row, values, [&](auto common, auto col) __attribute__((always_inline)) {
        return std::pair(common, mirrored ? col : static_cast<decltype(col)>(size));
      });
  }
}

// ---- Columns to look at ----

// Bit j of the result says whether the j-th of 64 values is at least the j-th bound.
template <typename V>
NSS_INLINE uint64_t at_least_64(const V* values, V bound, const V* mirror, const V* bounds) {
  uint64_t found = 0;
#if NSS_LANE_BYTES == 64
  if constexpr (sizeof(V) == 4) {
    const __m512 all = _mm512_set1_ps(bound);
    NSS_EACH(4, const int k = 16 * i;
             const __mmask16 row = _mm512_cmp_ps_mask(_mm512_loadu_ps(values + k), all, _CMP_GE_OQ);
             const __mmask16 col = _mm512_cmp_ps_mask(_mm512_loadu_ps(mirror + k),
                                                      _mm512_loadu_ps(bounds + k), _CMP_GE_OQ);
             found |= static_cast<uint64_t>(row | col) << k);
  } else {
    const __m512d all = _mm512_set1_pd(bound);
    NSS_EACH(8, const int k = 8 * i;
             const __mmask8 row = _mm512_cmp_pd_mask(_mm512_loadu_pd(values + k), all, _CMP_GE_OQ);
             const __mmask8 col = _mm512_cmp_pd_mask(_mm512_loadu_pd(mirror + k),
                                                     _mm512_loadu_pd(bounds + k), _CMP_GE_OQ);
             found |= static_cast<uint64_t>(row | col) << k);
  }
#elif NSS_LANE_BYTES == 32
  if constexpr (sizeof(V) == 4) {
    const __m256 all = _mm256_set1_ps(bound);
    NSS_EACH(8, const int k = 8 * i;
             const __m256 row = _mm256_cmp_ps(_mm256_loadu_ps(values + k), all, _CMP_GE_OQ);
             const __m256 col = _mm256_cmp_ps(_mm256_loadu_ps(mirror + k),
                                              _mm256_loadu_ps(bounds + k), _CMP_GE_OQ);
             found |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_or_ps(row, col))) << k);
  } else {
    const __m256d all = _mm256_set1_pd(bound);
    NSS_EACH(16, const int k = 4 * i;
             const __m256d row = _mm256_cmp_pd(_mm256_loadu_pd(values + k), all, _CMP_GE_OQ);
             const __m256d col = _mm256_cmp_pd(_mm256_loadu_pd(mirror + k),
                                               _mm256_loadu_pd(bounds + k), _CMP_GE_OQ);
             found |= static_cast<uint64_t>(_mm256_movemask_pd(_mm256_or_pd(row, col))) << k);
  }
#else
  for (int j = 0; j < 64; ++j) {
    found |= static_cast<uint64_t>((values[j] >= bound) | (mirror[j] >= bounds[j])) << j;
  }
#endif
  return found;
}

// The same of 64 counts that are above the bound of find_common.
NSS_INLINE uint64_t above_64(const uint16_t* counts, const uint16_t* sizes, uint16_t size,
                             bool smaller, uint16_t ratio) {
  uint64_t found = 0;
#if NSS_LANE_BYTES == 64
  const __m512i own = _mm512_set1_epi16(static_cast<int16_t>(size));
  const __m512i ratios = _mm512_set1_epi16(static_cast<int16_t>(ratio));
  NSS_EACH(
      2, const __m512i other = _mm512_loadu_si512(sizes + 32 * i);
      const __m512i key = smaller ? _mm512_min_epu16(own, other) : _mm512_add_epi16(own, other);
      const __mmask32 enough = _mm512_cmpgt_epu16_mask(_mm512_loadu_si512(counts + 32 * i),
                                                       _mm512_mulhi_epu16(key, ratios));
      found |= static_cast<uint64_t>(enough) << (32 * i));
#elif NSS_LANE_BYTES == 32
  const __m256i own = _mm256_set1_epi16(static_cast<int16_t>(size));
  const __m256i ratios = _mm256_set1_epi16(static_cast<int16_t>(ratio));
  const auto enough = [&](int k) __attribute__((always_inline)) {
    const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sizes + k));
    const __m256i key = smaller ? _mm256_min_epu16(own, other) : _mm256_add_epi16(own, other);
    const __m256i count = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(counts + k));
    // At least one more is above; there is no comparison of unsigned words.
    const __m256i least = _mm256_add_epi16(_mm256_mulhi_epu16(key, ratios), _mm256_set1_epi16(1));
    return _mm256_cmpeq_epi16(_mm256_max_epu16(count, least), count);
  };
  NSS_EACH(2, const __m256i halves = _mm256_packs_epi16(enough(32 * i), enough(32 * i + 16));
           const __m256i in_order = _mm256_permute4x64_epi64(halves, 0xd8);
           const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_epi8(in_order));
           found |= static_cast<uint64_t>(bits) << (32 * i));
#else
  for (int j = 0; j < 64; ++j) {
    const uint32_t key =
        smaller ? std::min(size, sizes[j]) : static_cast<uint32_t>(size) + sizes[j];
    found |= static_cast<uint64_t>(counts[j] > (key * ratio >> 16)) << j;
  }
#endif
  return found;
}

#if defined(NSS_BITALG)
// Writes j and the numbers of the set bits after it, and up to 32 places of no meaning behind them.
// Without a branch for each bit: which pairs are alike enough, no branch predictor knows.
NSS_INLINE int64_t list_bits(int64_t j, uint64_t bits, Found* found) {
  const __m512i lowest =
      _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13,
                       12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const auto half = [&](int64_t from, uint32_t mask, Found* to) __attribute__((always_inline)) {
    const __m512i columns = _mm512_add_epi16(lowest, _mm512_set1_epi16(static_cast<int16_t>(from)));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(mask, columns));
    return __builtin_popcount(mask);
  };
  const int64_t low = half(j, static_cast<uint32_t>(bits), found);
  return low + half(j + 32, static_cast<uint32_t>(bits >> 32), found + low);
}
#else
NSS_INLINE int64_t list_bits(int64_t j, uint64_t bits, Found* found) {
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1) {
    found[count++] = static_cast<Found>(j + __builtin_ctzll(bits));
  }
  return count;
}
#endif

// The columns from `first` on that a mask of 64 names, each plus `base`; `mask(j)` starts at j, and
// may look past the last column, up to kTile.
template <typename Mask>
NSS_INLINE int64_t list_columns(int64_t first, int64_t cols, int64_t base, Found* found,
                                const Mask& mask) {
  int64_t count = 0;
  for (int64_t j = first / 64 * 64; j < cols; j += 64) {
    uint64_t bits = mask(j);
    if (j < first) bits &= ~uint64_t{0} << (first - j);
    if (cols - j < 64) bits &= ~(~uint64_t{0} << (cols - j));
    count += list_bits(base + j, bits, found + count);
  }
  return count;
}

int64_t find_common(const CommonRow<uint16_t>& row, bool smaller, uint16_t ratio, int64_t first,
                    int64_t base, Found* found) {
  const auto size = static_cast<uint16_t>(row.row_size);
  return list_columns(first, row.cols, base, found, [&](int64_t j) __attribute__((always_inline)) {
    return above_64(row.common + j, row.col_sizes + j, size, smaller, ratio);
  });
}

template <typename V>
int64_t find_values(const V* values, V bound, const V* mirror, const V* bounds, int64_t first,
                    int64_t cols, Found* found) {
  return list_columns(first, cols, 0, found, [&](int64_t j) __attribute__((always_inline)) {
    return at_least_64(values + j, bound, mirror + j, bounds + j);
  });
}

// ---- Unit vectors ----

// As unit_map() of common/similarity.h, with sixteen sums side by side.
template <typename T>
NSS_INLINE UnitMap row_map(const T* row, int64_t size, bool centre) {
  using V = decltype(to_value(T{}));
  const int64_t whole = size / 16 * 16;
  UnitMap map;
  Lanes<V> most = Lanes<V>::all(0), wrong = Lanes<V>::all(0);
  for (int64_t d = 0; d < whole; d += 16) {
    const Lanes<V> values = load_lanes(row + d);
    most = values.magnitude().max(most);
    wrong += values - values;
  }
  double largest = most.largest();
  bool finite = wrong.all_finite();
  for (int64_t d = whole; d < size; ++d) {
    const double magnitude = std::fabs(static_cast<double>(to_value(row[d])));
    finite = finite && std::isfinite(magnitude);
    largest = std::max(largest, magnitude);
  }
  if (!finite) {
    map.norm = std::numeric_limits<double>::quiet_NaN();
    return map;
  }
  if (largest == 0) return map;
  map.scale = unit_scale(largest);
  const auto sum = [&](const auto& term) __attribute__((always_inline)) {
    Lanes<double> sums = Lanes<double>::all(0);
    for (int64_t d = 0; d < whole; d += 16) {
      const Lanes<double> scaled = widen(load_lanes(row + d)) * map.scale;
      sums += term((scaled - Lanes<double>::all(map.shift)) - Lanes<double>::all(map.mean));
    }
    double total = sums.total();
    for (int64_t d = whole; d < size; ++d) {
      total += term(map.centred(static_cast<double>(to_value(row[d]))));
    }
    return total;
  };
  if (centre) {
    map.shift = static_cast<double>(to_value(row[0])) * map.scale;
    map.mean = sum([](const auto& x) __attribute__((always_inline)) { return x; }) /
               static_cast<double>(size);
  }
  map.norm = std::sqrt(sum([](const auto& x) __attribute__((always_inline)) { return x * x; }));
  return map;
}

template <typename T>
void unit_rows_of(const UnitJob& job, int64_t first, int64_t last) {
  using V = decltype(to_value(T{}));
  const int64_t whole = job.size / 16 * 16;
  for (int64_t r = first; r < last; ++r) {
    const T* row = static_cast<const T*>(job.x) + r * job.size;
    V* const unit = static_cast<V*>(job.unit) + r * job.size;
    const UnitMap map = row_map(row, job.size, job.centre);
    if (map.norm == 0) {
      std::fill_n(unit, job.size, V(0));
      continue;
    }
    for (int64_t d = 0; d < whole; d += 16) {
      const Lanes<double> scaled = widen(load_lanes(row + d)) * map.scale;
      const Lanes<double> centred =
          (scaled - Lanes<double>::all(map.shift)) - Lanes<double>::all(map.mean);
      narrow<V>(centred / map.norm).store(unit + d);
    }
    for (int64_t d = whole; d < job.size; ++d) {
      unit[d] = static_cast<V>(map(static_cast<double>(to_value(row[d]))));
    }
  }
}

void unit_rows(const UnitJob& job, int64_t first, int64_t last) {
  switch (job.element) {
    case Element::kFloat64:
      return unit_rows_of<double>(job, first, last);
    case Element::kFloat32:
      return unit_rows_of<float>(job, first, last);
    case Element::kFloat16:
      return unit_rows_of<Float16>(job, first, last);
    case Element::kBFloat16:
      return unit_rows_of<BFloat16>(job, first, last);
  }
}

template <typename V>
void clamp_values(V* values, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    V* const row = values + i * kTile;
    for (int64_t j = 0; j < cols; ++j) {
      const V low = row[j] < V(-1) ? V(-1) : row[j];
      row[j] = low > V(1) ? V(1) : low;
    }
  }
}

constexpr SimilarityLoops kLoops = {
    .count_common = count_common,
    .set_values_16 = set_values<float, uint16_t>,
    .set_values_32 = set_values<double, uint32_t>,
    .find_common = find_common,
    .find_floats = find_values<float>,
    .find_doubles = find_values<double>,
    .unit_rows = unit_rows,
    .clamp_floats = clamp_values<float>,
    .clamp_doubles = clamp_values<double>,
};
