// The loops of rows_job.h. Included inside a namespace of each instruction set, after lanes.h.
//
// A sum is that of sixteen partial ones, which are added up at the end of a part; how many of them
// are taken side by side differs with the number of registers, and does not change their bits.

#if NSS_LANE_BYTES == 64
constexpr int kRowBlock = 3, kTapBlock = 9;
#elif NSS_LANE_BYTES == 32
constexpr int kRowBlock = 2, kTapBlock = 3;
#else
constexpr int kRowBlock = 1, kTapBlock = 3;
#endif

template <typename S>
void pack_grad_of(const PackGradJob& job, int64_t first_sample, int64_t last_sample) {
  const ConvRowsLayout& at = *job.layout;
  const auto& [depth, height, width] = at.output;
  for (int64_t n = first_sample; n < last_sample; ++n) {
    const S* from = static_cast<const S*>(job.grad) + n * job.sample_stride;
    ValueOf<S>* to = static_cast<ValueOf<S>*>(job.packed) + n * job.row_count * at.line;
    std::fill_n(to, job.row_count * at.line, ValueOf<S>{});
    for (int64_t z = 0; z < depth; ++z) {
      for (int64_t y = 0; y < height; ++y) {
        // All rows of a line before the next: in channels last they share its cache lines.
        for (int64_t r = 0; r < job.row_count; ++r) {
          const S* line =
              from + job.rows[r] * job.channel_stride + z * job.strides[0] + y * job.strides[1];
          ValueOf<S>* packed = to + r * at.line + (z * at.extent[1] + y) * at.extent[2];
          for (int64_t i = 0; i < width; ++i) packed[i] = to_value(line[i * job.strides[2]]);
        }
      }
    }
  }
}

// The places of a plane that lie inside the input, along one dimension.
struct Inside {
  int64_t first;
  int64_t last;
  Inside(const ConvRowsLayout& at, const Sizes3& phase, int d) {
    const int64_t before = at.padding[d] - phase[d];
    first = std::max<int64_t>(0, (before + at.stride[d] - 1) / at.stride[d]);
    last = std::min(at.extent[d], (at.input[d] + before + at.stride[d] - 1) / at.stride[d]);
  }
};

template <typename S>
void widen(const S* from, int64_t count, ValueOf<S>* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) load_lanes(from + i).store(to + i);
  for (; i < count; ++i) to[i] = to_value(from[i]);
}

// A line of a plane, which is too short for a call of memcpy to pay.
template <typename V>
NSS_INLINE void copy_line(const V* from, int64_t count, V* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) Lanes<V>::load(from + i).store(to + i);
  for (; i + 4 <= count; i += 4) __builtin_memcpy(to + i, from + i, 4 * sizeof(V));
  for (; i < count; ++i) to[i] = from[i];
}

// One channel of one sample; places outside the input are left as they are, zero.
template <typename V>
void pack_planes(const ConvRowsLayout& at, const V* x, V* planes) {
  for (const Sizes3& phase : at.phases) {
    const Inside depth(at, phase, 0), height(at, phase, 1), width(at, phase, 2);
    const auto place = [&](int d, int64_t i) {
      return i * at.stride[d] + phase[d] - at.padding[d];
    };
    for (int64_t z = depth.first; z < depth.last; ++z) {
      for (int64_t y = height.first; y < height.last; ++y) {
        const V* line = x + (place(0, z) * at.input[1] + place(1, y)) * at.input[2];
        V* packed = planes + (z * at.extent[1] + y) * at.extent[2];
        if (at.stride[2] == 1) {
          copy_line(line + place(2, width.first), width.last - width.first, packed + width.first);
        } else if (at.stride[2] == 2) {  // known here, and so done by shuffles
          const V* from = line + place(2, width.first);
          V* to = packed + width.first;
          for (int64_t i = 0; i < width.last - width.first; ++i) to[i] = from[2 * i];
        } else {
          for (int64_t i = width.first; i < width.last; ++i) packed[i] = line[place(2, i)];
        }
      }
    }
    planes += at.plane;
  }
}

// Asks for the plane of a later sample, and no nearer than the second cache, which can wait for
// more lines at a time: from sample to sample they lie far apart, which the processor cannot
// foresee. Through large planes it looks ahead itself.
template <typename S>
void prefetch_plane(const S* x, int64_t points) {
  constexpr int64_t kLine = 64 / sizeof(S), kMost = 8192 / sizeof(S);
  if (points > kMost) return;
  for (int64_t i = 0; i < points; i += kLine) __builtin_prefetch(x + i, 0, 2);
}

// Adds grad * x to kRows x kTaps sums of sixteen values.
template <typename V>
struct Correlation {
  const V* grad;
  int64_t grad_sample;  // from one sample to the next
  const V* x;
  int64_t x_sample;
  int64_t samples;
  int64_t line;
  const int64_t* offsets;
  int64_t taps;
  bool triples;  // taps come in threes, with places side by side
  V* sums;       // [rows, taps, 16]

  template <int kRows, int kTaps>
  NSS_INLINE void add(int64_t row, int64_t tap) const {
    Lanes<V> sum[kRows][kTaps];
    V* out = sums + (row * taps + tap) * 16;
    NSS_EACH(kRows, constexpr int r = i;
             NSS_EACH(kTaps, sum[r][i] = Lanes<V>::load(out + (r * taps + i) * 16)));
    for (int64_t n = 0; n < samples; ++n) {
      const V* g = grad + n * grad_sample + row * line;
      const V* at = x + n * x_sample;
#if NSS_LANE_BYTES == 64
      if constexpr (kTaps % 3 == 0) {
        if (triples) {
          add_triples(sum, g, at, offsets + tap);
          continue;
        }
      }
#endif
      for (int64_t q = 0; q < line; q += 16) {
        Lanes<V> of_rows[kRows];
        NSS_EACH(kRows, of_rows[i] = Lanes<V>::load(g + i * line + q));
        NSS_EACH(kTaps, constexpr int t = i;
                 const auto of_tap = Lanes<V>::load(at + offsets[tap + t] + q);
                 NSS_EACH(kRows, sum[i][t] += of_rows[i] * of_tap));
      }
    }
    NSS_EACH(kRows, constexpr int r = i;
             NSS_EACH(kTaps, sum[r][i].store(out + (r * taps + i) * 16)));
  }

#if NSS_LANE_BYTES == 64
  // One sample. Of three taps one is loaded, and the others are made of it and of what follows:
  // loads that are not aligned cross cache lines, and bound the loop where rows are few.
  template <int kRows, int kTaps>
  NSS_INLINE void add_triples(Lanes<V> (&sum)[kRows][kTaps], const V* g, const V* at,
                              const int64_t* first) const {
    Lanes<V> now[kTaps / 3];
    NSS_EACH(kTaps / 3, now[i] = Lanes<V>::load(at + first[3 * i]));
    for (int64_t q = 0; q < line; q += 16) {
      Lanes<V> of_rows[kRows];
      NSS_EACH(kRows, of_rows[i] = Lanes<V>::load(g + i * line + q));
      NSS_EACH(kTaps / 3, constexpr int t = 3 * i; const auto of_tap = now[i];
               now[i] = Lanes<V>::load(at + first[t] + q + 16);
               const auto second = of_tap.template followed_by<1>(now[i]);
               const auto third = of_tap.template followed_by<2>(now[i]);
               NSS_EACH(kRows, sum[i][t] += of_rows[i] * of_tap);
               NSS_EACH(kRows, sum[i][t + 1] += of_rows[i] * second);
               NSS_EACH(kRows, sum[i][t + 2] += of_rows[i] * third));
    }
  }
#endif

  template <int kRows>
  void add_rows(int64_t row) const {
    int64_t tap = 0;
    for (; tap + kTapBlock <= taps; tap += kTapBlock) add<kRows, kTapBlock>(row, tap);
    if constexpr (kTapBlock > 3) {
      for (; tap + 3 <= taps; tap += 3) add<kRows, 3>(row, tap);
    }
    for (; tap < taps; ++tap) add<kRows, 1>(row, tap);
  }

  void add_all(int64_t rows) const {
    int64_t row = 0;
    for (; row + kRowBlock <= rows; row += kRowBlock) add_rows<kRowBlock>(row);
    if constexpr (kRowBlock > 2) {
      if (row + 2 <= rows) add_rows<2>(row), row += 2;
    }
    if (row < rows) add_rows<1>(row);
  }
};

// As many channels at a time as fill a block of taps, as many samples as stay in the cache.
constexpr int64_t kPlaneBytes = 16384;

// The first address in a vector's storage that is a multiple of 64 bytes, of which up to 15 values
// lie before it.
template <typename V>
V* aligned(std::vector<V>& storage) {
  const auto address = reinterpret_cast<uintptr_t>(storage.data());
  return reinterpret_cast<V*>((address + 63) / 64 * 64);
}

template <typename S>
void conv_rows_of(const ConvRowsJob& job, const ConvRowsPart& part) {
  using V = ValueOf<S>;
  const ConvRowsLayout& at = *job.layout;
  const int64_t taps = static_cast<int64_t>(at.offsets.size());
  const int64_t rows = part.last_row - part.first_row;
  const int64_t points = at.input[0] * at.input[1] * at.input[2];
  const int64_t abreast = std::max<int64_t>(1, kTapBlock / taps);
  const int64_t bytes = abreast * at.planes * static_cast<int64_t>(sizeof(V));
  const int64_t batch = std::clamp<int64_t>(
      kPlaneBytes / bytes, 1, std::max<int64_t>(1, part.last_sample - part.first_sample));
  const int64_t ahead = std::max<int64_t>(1, 2048 / (points * sizeof(S)));
  // Half precision is widened once, before it is laid out in several planes.
  std::vector<V> widened(std::is_same_v<S, V> ? 0 : points);
  // Behind the planes are sixteen values that taps in threes load, and do not use.
  std::vector<V> plane_storage(batch * abreast * at.planes + 32);
  std::vector<V> sum_storage(rows * abreast * taps * 16 + 16);
  V *const planes = aligned(plane_storage), *const sums = aligned(sum_storage);
  std::vector<int64_t> offsets(abreast * taps);
  bool triples = taps % 3 == 0;
  for (int64_t c = 0; c < abreast; ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      offsets[c * taps + t] = c * at.planes + at.offsets[t];
      triples &= at.offsets[t] == at.offsets[t - t % 3] + t % 3;
    }
  }
  for (int64_t input = part.first_input; input < part.last_input; input += abreast) {
    const int64_t channels = std::min(abreast, part.last_input - input);
    std::fill(sum_storage.begin(), sum_storage.end(), V{});
    for (int64_t n = part.first_sample; n < part.last_sample; n += batch) {
      const int64_t samples = std::min(batch, part.last_sample - n);
      for (int64_t i = 0; i < samples; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          const S* x = static_cast<const S*>(job.x) +
                       ((n + i) * job.channels + part.channel + input + c) * points;
          if (n + i + ahead < part.last_sample) {
            prefetch_plane(x + ahead * job.channels * points, points);
          }
          V* to = planes + (i * abreast + c) * at.planes;
          if constexpr (std::is_same_v<S, V>) {
            pack_planes(at, x, to);
          } else {
            widen(x, points, widened.data());
            pack_planes(at, widened.data(), to);
          }
        }
      }
      Correlation<V>{
          static_cast<const V*>(job.packed) + (n * job.row_count + part.first_row) * at.line,
          job.row_count * at.line,
          planes,
          abreast * at.planes,
          samples,
          at.line,
          offsets.data(),
          channels * taps,
          triples,
          sums}
          .add_all(rows);
    }
    for (int64_t r = 0; r < rows; ++r) {
      V* out = static_cast<V*>(part.sums) + ((part.first_row + r) * at.inputs + input) * taps;
      for (int64_t t = 0; t < channels * taps; ++t) {
        out[t] = Lanes<V>::load(sums + (r * channels * taps + t) * 16).total();
      }
    }
  }
}

// What is added to the sums of a row: grad, or grad * (x - center).
template <typename S, bool kTimesX>
struct Summand {
  using V = ValueOf<S>;
  const S* grad;
  const S* x;
  V center;

  NSS_INLINE Lanes<V> lanes(int64_t i) const {
    const Lanes<V> of = load_lanes(grad + i);
    if constexpr (kTimesX) return of * (load_lanes(x + i) - Lanes<V>::all(center));
    return of;
  }

  V value(int64_t i) const {
    const V of = to_value(grad[i]);
    if constexpr (kTimesX) return of * (to_value(x[i]) - center);
    return of;
  }
};

// Where neurons lie side by side, the partial sums of all rows do so too.
template <typename S>
void column_sums_of(const RowSumsJob& job, int64_t first_row, int64_t last_row) {
  using V = ValueOf<S>;
  const int64_t count = last_row - first_row;
  const int64_t* rows = job.rows + first_row;
  std::vector<V> sums(16 * count);
  for (int64_t n = 0; n < job.outer; ++n) {
    const S* from = static_cast<const S*>(job.grad) + n * job.neurons;
    V* sum = sums.data() + n % 16 * count;
    for (int64_t r = 0; r < count; ++r) sum[r] += to_value(from[rows[r]]);
  }
  for (int64_t r = 0; r < count; ++r) {
    V parts[16];
    for (int i = 0; i < 16; ++i) parts[i] = sums[i * count + r];
    static_cast<V*>(job.sums)[first_row + r] = Lanes<V>::load(parts).total();
  }
}

template <typename S, bool kTimesX>
void row_sums_of(const RowSumsJob& job, int64_t first_row, int64_t last_row) {
  using V = ValueOf<S>;
  std::vector<V> sums((last_row - first_row) * 16);
  for (int64_t n = 0; n < job.outer; ++n) {
    for (int64_t r = first_row; r < last_row; ++r) {
      const int64_t from = (n * job.neurons + job.rows[r]) * job.inner;
      Summand<S, kTimesX> of{static_cast<const S*>(job.grad) + from, nullptr, V{}};
      if constexpr (kTimesX) {
        of.x = static_cast<const S*>(job.x) + from;
        of.center = static_cast<const V*>(job.center)[job.rows[r]];
      }
      V* sum = sums.data() + (r - first_row) * 16;
      int64_t i = 0;
      if (job.inner >= 16) {
        Lanes<V> lanes = Lanes<V>::load(sum);
        for (; i + 16 <= job.inner; i += 16) lanes += of.lanes(i);
        lanes.store(sum);
      }
      // Neighbouring samples of a few places each go to different partial sums.
      for (; i < job.inner; ++i) sum[(n * job.inner + i) % 16] += of.value(i);
    }
  }
  for (int64_t r = first_row; r < last_row; ++r) {
    static_cast<V*>(job.sums)[r] = Lanes<V>::load(sums.data() + (r - first_row) * 16).total();
  }
}

void pack_grad(const PackGradJob& job, int64_t first_sample, int64_t last_sample) {
  with_element(job.element,
               [&](auto e) { pack_grad_of<decltype(e)>(job, first_sample, last_sample); });
}

void conv_rows(const ConvRowsJob& job, const ConvRowsPart& part) {
  with_element(job.element, [&](auto e) { conv_rows_of<decltype(e)>(job, part); });
}

void row_sums(const RowSumsJob& job, int64_t first_row, int64_t last_row) {
  with_element(job.element, [&](auto e) {
    using S = decltype(e);
    if (job.x) return row_sums_of<S, true>(job, first_row, last_row);
    if (job.inner > 1) return row_sums_of<S, false>(job, first_row, last_row);
    column_sums_of<S>(job, first_row, last_row);
  });
}
