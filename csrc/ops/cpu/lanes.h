// Sixteen values side by side, whatever the width of the registers. Included inside a namespace of
// each instruction set, after NSS_LANE_BYTES (16, 32 or 64) was defined: see class_stats_avx2.cpp.
// There is no include guard, because the types differ from one inclusion to the next.
//
// Element i of a result depends on element i of the operands only, and no multiplication is fused
// with an addition (-ffp-contract=off) but by fused(), so every width gives the same bits.

#define NSS_INLINE inline __attribute__((always_inline))
#define NSS_EACH(N, ...) unrolled<N>([&](auto i) __attribute__((always_inline)) { __VA_ARGS__; })

// f(0), f(1), ..., f(N - 1) with constant arguments. A loop would do the same, but gcc would keep
// the arrays that it indexes in memory.
template <typename F, int... I>
NSS_INLINE void unrolled(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
NSS_INLINE void unrolled(const F& f) {
  unrolled(f, std::make_integer_sequence<int, N>{});
}

template <typename V>
struct Lanes {
  using Integer = std::conditional_t<sizeof(V) == 8, int64_t, int32_t>;
  typedef V Register __attribute__((vector_size(NSS_LANE_BYTES)));
  typedef Integer Bits __attribute__((vector_size(NSS_LANE_BYTES)));
  static constexpr int kWidth = NSS_LANE_BYTES / sizeof(V);
  static constexpr int kRegisters = 16 / kWidth;

  Register r[kRegisters];

  static NSS_INLINE Lanes load(const V* p) {
    Lanes a;
    NSS_EACH(kRegisters, __builtin_memcpy(&a.r[i], p + i * kWidth, sizeof(Register)));
    return a;
  }
  // The first `count`, and zeros.
  static NSS_INLINE Lanes load(const V* p, int64_t count) {
    if (count == 16) return load(p);
    V padded[16] = {};
    std::copy_n(p, count, padded);
    return load(padded);
  }
  static NSS_INLINE Lanes all(V value) {
    Lanes a;
    NSS_EACH(kRegisters, a.r[i] = Register{} + value);
    return a;
  }
  NSS_INLINE void store(V* p) const {
    NSS_EACH(kRegisters, __builtin_memcpy(p + i * kWidth, &r[i], sizeof(Register)));
  }
  NSS_INLINE void store(V* p, int64_t count) const {
    if (count == 16) return store(p);
    V padded[16];
    store(padded);
    std::copy_n(padded, count, p);
  }

  NSS_INLINE Lanes operator+(const Lanes& b) const {
    Lanes a;
    NSS_EACH(kRegisters, a.r[i] = r[i] + b.r[i]);
    return a;
  }
  NSS_INLINE Lanes operator-(const Lanes& b) const {
    Lanes a;
    NSS_EACH(kRegisters, a.r[i] = r[i] - b.r[i]);
    return a;
  }
  NSS_INLINE Lanes operator*(const Lanes& b) const {
    Lanes a;
    NSS_EACH(kRegisters, a.r[i] = r[i] * b.r[i]);
    return a;
  }
  NSS_INLINE Lanes operator/(const Lanes& b) const {
    Lanes a;
    NSS_EACH(kRegisters, a.r[i] = r[i] / b.r[i]);
    return a;
  }
  NSS_INLINE Lanes operator-() const {
    Lanes a;
    NSS_EACH(kRegisters, a.r[i] = -r[i]);
    return a;
  }
  NSS_INLINE Lanes operator+(V b) const {
    Lanes a;
    NSS_EACH(kRegisters, a.r[i] = r[i] + b);
    return a;
  }
  NSS_INLINE Lanes operator*(V b) const {
    Lanes a;
    NSS_EACH(kRegisters, a.r[i] = r[i] * b);
    return a;
  }
  NSS_INLINE Lanes operator/(V b) const {
    Lanes a;
    NSS_EACH(kRegisters, a.r[i] = r[i] / b);
    return a;
  }
  NSS_INLINE void operator+=(const Lanes& b) { *this = *this + b; }
  NSS_INLINE Lanes magnitude() const {
    Lanes a;
    NSS_EACH(kRegisters, a.r[i] = (Register)((Bits)r[i] & std::numeric_limits<Integer>::max()));
    return a;
  }
  // The larger of the two; b's where one is not a number.
  NSS_INLINE Lanes max(const Lanes& b) const {
    Lanes a;
    NSS_EACH(kRegisters, a.r[i] = r[i] > b.r[i] ? r[i] : b.r[i]);
    return a;
  }
  // Halves are combined until one value is left, whole registers first.
  NSS_INLINE V total() const {
    return folded([](const auto& a, const auto& b)
                      __attribute__((always_inline)) { return a + b; });
  }
  NSS_INLINE V largest() const {
    return folded([](const auto& a, const auto& b)
                      __attribute__((always_inline)) { return a > b ? a : b; });
  }
  NSS_INLINE Lanes without_first(int64_t count) const {
    static constexpr Integer kKept[32] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                          0,  0,  0,  0,  0,  -1, -1, -1, -1, -1, -1,
                                          -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    Lanes a;
    NSS_EACH(kRegisters, Bits kept;
             __builtin_memcpy(&kept, kKept + 16 - count + i * kWidth, sizeof(kept));
             a.r[i] = (Register)((Bits)r[i] & kept));
    return a;
  }
#if NSS_LANE_BYTES == 64
  // The sixteen from element kFirst on of these and those that follow them.
  template <int kFirst>
  NSS_INLINE Lanes followed_by(const Lanes& next) const {
    Lanes a;
    NSS_EACH(
        kRegisters, const auto here = (__m512i)r[i];
        const auto behind = (__m512i)(i + 1 < kRegisters ? r[(i + 1) % kRegisters] : next.r[0]);
        if constexpr (sizeof(V) == 4) {
          a.r[i] = (Register)_mm512_alignr_epi32(behind, here, kFirst);
        } else { a.r[i] = (Register)_mm512_alignr_epi64(behind, here, kFirst); });
    return a;
  }
#endif
  NSS_INLINE Lanes zero_unless_finite() const {
    Lanes a;
    NSS_EACH(kRegisters, a.r[i] = (Register)((Bits)r[i] & (r[i] - r[i] == Register{})));
    return a;
  }
  NSS_INLINE bool all_finite() const {
    Bits finite = ~Bits{};
    NSS_EACH(kRegisters, finite &= (r[i] - r[i] == Register{}));
    return all_set(finite);
  }
  NSS_INLINE bool all_within(V low, V high) const {
    Bits within = ~Bits{};
    NSS_EACH(kRegisters, within &= (r[i] >= low) & (r[i] <= high));
    return all_set(within);
  }

 private:
  template <typename F>
  NSS_INLINE V folded(const F& f) const {
    Lanes a = *this;
    if constexpr (kRegisters >= 8) NSS_EACH(4, a.r[i] = f(a.r[i], a.r[i + 4]));
    if constexpr (kRegisters >= 4) NSS_EACH(2, a.r[i] = f(a.r[i], a.r[i + 2]));
    if constexpr (kRegisters >= 2) a.r[0] = f(a.r[0], a.r[1]);
    V v[kWidth];
    __builtin_memcpy(v, &a.r[0], sizeof(v));
    if constexpr (kWidth >= 16) NSS_EACH(8, v[i] = f(v[i], v[i + 8]));
    if constexpr (kWidth >= 8) NSS_EACH(4, v[i] = f(v[i], v[i + 4]));
    if constexpr (kWidth >= 4) NSS_EACH(2, v[i] = f(v[i], v[i + 2]));
    return f(v[0], v[1]);
  }
  static NSS_INLINE bool all_set(const Bits& bits) {
    int64_t words[NSS_LANE_BYTES / 8];
    __builtin_memcpy(words, &bits, sizeof(bits));
    int64_t all = -1;
    for (const int64_t word : words) all &= word;
    return all == -1;
  }
};

// The functions of common/optimizer_math.h.

template <typename V>
NSS_INLINE Lanes<V> fused(const Lanes<V>& a, const Lanes<V>& b, const Lanes<V>& c) {
  using Register [[maybe_unused]] = typename Lanes<V>::Register;
  Lanes<V> sum;
#if NSS_LANE_BYTES == 64
  if constexpr (sizeof(V) == 8) {
    NSS_EACH(
        2, sum.r[i] = (Register)_mm512_fmadd_pd((__m512d)a.r[i], (__m512d)b.r[i], (__m512d)c.r[i]));
  } else {
    sum.r[0] = (Register)_mm512_fmadd_ps((__m512)a.r[0], (__m512)b.r[0], (__m512)c.r[0]);
  }
#elif NSS_LANE_BYTES == 32
  if constexpr (sizeof(V) == 8) {
    NSS_EACH(
        4, sum.r[i] = (Register)_mm256_fmadd_pd((__m256d)a.r[i], (__m256d)b.r[i], (__m256d)c.r[i]));
  } else {
    NSS_EACH(2,
             sum.r[i] = (Register)_mm256_fmadd_ps((__m256)a.r[i], (__m256)b.r[i], (__m256)c.r[i]));
  }
#else
  NSS_EACH(16, constexpr int kR = i / Lanes<V>::kWidth; constexpr int kI = i % Lanes<V>::kWidth;
           sum.r[kR][kI] = std::fma(a.r[kR][kI], b.r[kR][kI], c.r[kR][kI]));
#endif
  return sum;
}
template <typename V>
NSS_INLINE Lanes<V> fused(V a, const Lanes<V>& b, const Lanes<V>& c) {
  return fused(Lanes<V>::all(a), b, c);
}

template <typename V>
NSS_INLINE Lanes<V> root(const Lanes<V>& a) {
  using Register [[maybe_unused]] = typename Lanes<V>::Register;
  Lanes<V> b;
#if NSS_LANE_BYTES == 64
  if constexpr (sizeof(V) == 8) {
    NSS_EACH(2, b.r[i] = (Register)_mm512_sqrt_pd((__m512d)a.r[i]));
  } else {
    b.r[0] = (Register)_mm512_sqrt_ps((__m512)a.r[0]);
  }
#elif NSS_LANE_BYTES == 32
  if constexpr (sizeof(V) == 8) {
    NSS_EACH(4, b.r[i] = (Register)_mm256_sqrt_pd((__m256d)a.r[i]));
  } else {
    NSS_EACH(2, b.r[i] = (Register)_mm256_sqrt_ps((__m256)a.r[i]));
  }
#else
  NSS_EACH(16, constexpr int kR = i / Lanes<V>::kWidth; constexpr int kI = i % Lanes<V>::kWidth;
           b.r[kR][kI] = std::sqrt(a.r[kR][kI]));
#endif
  return b;
}

// The larger of the two; NaN if either is.
template <typename V>
NSS_INLINE Lanes<V> larger(const Lanes<V>& a, const Lanes<V>& b) {
  Lanes<V> c;
  NSS_EACH(Lanes<V>::kRegisters, c.r[i] = (a.r[i] > b.r[i]) | (a.r[i] != a.r[i]) ? a.r[i] : b.r[i]);
  return c;
}

// a, or b where `condition` is 0.
template <typename V>
NSS_INLINE Lanes<V> chosen(const Lanes<V>& condition, const Lanes<V>& a, const Lanes<V>& b) {
  Lanes<V> c;
  NSS_EACH(Lanes<V>::kRegisters,
           c.r[i] = condition.r[i] != typename Lanes<V>::Register{} ? a.r[i] : b.r[i]);
  return c;
}

// How many values of each lane were positive.
template <typename V>
struct Counts {
  typename Lanes<V>::Bits r[Lanes<V>::kRegisters] = {};

  NSS_INLINE void add_positive(const Lanes<V>& a) {
#if NSS_LANE_BYTES == 64
    // gcc makes lanes of the comparison's mask before it subtracts them.
    if constexpr (sizeof(V) == 4) {
      const __mmask16 positive =
          _mm512_cmp_ps_mask((__m512)a.r[0], _mm512_setzero_ps(), _CMP_GT_OQ);
      const __m512i count = (__m512i)r[0];
      r[0] = (decltype(+r[0]))_mm512_mask_add_epi32(count, positive, count, _mm512_set1_epi32(1));
      return;
    }
#endif
    NSS_EACH(Lanes<V>::kRegisters, r[i] -= (a.r[i] > typename Lanes<V>::Register{}));
  }
  NSS_INLINE Lanes<V> values() const {
    Lanes<V> a;
    NSS_EACH(Lanes<V>::kRegisters,
             a.r[i] = __builtin_convertvector(r[i], typename Lanes<V>::Register));
    return a;
  }
};

// Conversions are spelled out, because gcc splits __builtin_convertvector between widths into
// pieces of two.

NSS_INLINE Lanes<double> widen(const Lanes<double>& a) { return a; }
NSS_INLINE Lanes<double> widen(const Lanes<float>& a) {
  using Wide [[maybe_unused]] = Lanes<double>::Register;
  Lanes<double> w;
#if NSS_LANE_BYTES == 64
  w.r[0] = (Wide)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)a.r[0]));
  w.r[1] = (Wide)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)a.r[0], 1));
#elif NSS_LANE_BYTES == 32
  NSS_EACH(2, w.r[2 * i] = (Wide)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)a.r[i]));
           w.r[2 * i + 1] = (Wide)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)a.r[i], 1)));
#else
  NSS_EACH(8, w.r[i] = (Wide{a.r[i / 2][i % 2 * 2], a.r[i / 2][i % 2 * 2 + 1]}));
#endif
  return w;
}

NSS_INLINE Lanes<float> to_float(const Lanes<float>& a) { return a; }
NSS_INLINE Lanes<float> to_float(const Lanes<double>& a) {
  using Narrow [[maybe_unused]] = Lanes<float>::Register;
  Lanes<float> n;
#if NSS_LANE_BYTES == 64
  n.r[0] = (Narrow)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)a.r[0])),
                                      _mm512_cvtpd_ps((__m512d)a.r[1]), 1);
#elif NSS_LANE_BYTES == 32
  NSS_EACH(2, n.r[i] = (Narrow)_mm256_insertf128_ps(
                  _mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)a.r[2 * i])),
                  _mm256_cvtpd_ps((__m256d)a.r[2 * i + 1]), 1));
#else
  float values[16];
  double wide[16];
  a.store(wide);
  for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(wide[i]);
  n = Lanes<float>::load(values);
#endif
  return n;
}

template <typename V>
NSS_INLINE Lanes<V> narrow(const Lanes<double>& a) {
  if constexpr (std::is_same_v<V, double>) {
    return a;
  } else {
    return to_float(a);
  }
}

// Sixteen elements in the type that they are computed in.
NSS_INLINE Lanes<double> load_lanes(const double* p) { return Lanes<double>::load(p); }
NSS_INLINE Lanes<float> load_lanes(const float* p) { return Lanes<float>::load(p); }
template <typename Half>
NSS_INLINE Lanes<float> load_lanes(const Half* p) {
  using Values [[maybe_unused]] = Lanes<float>::Register;
  Lanes<float> a;
#if NSS_LANE_BYTES == 64
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (Half::kBrain) {
    a.r[0] = (Values)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
  } else {
    a.r[0] = (Values)_mm512_cvtph_ps(raw);
  }
#elif NSS_LANE_BYTES == 32
  NSS_EACH(
      2, const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i));
      if constexpr (Half::kBrain) {
        a.r[i] = (Values)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
      } else { a.r[i] = (Values)_mm256_cvtph_ps(raw); });
#else
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = to_value(p[i]);
  a = Lanes<float>::load(values);
#endif
  return a;
}

#if NSS_LANE_BYTES == 64
NSS_INLINE void pack_words(void* p, __m512i words) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
}
#elif NSS_LANE_BYTES == 32
NSS_INLINE void pack_words(void* p, __m256i words) {
  const __m256i packed = _mm256_packus_epi32(words, words);
  _mm_storeu_si128(static_cast<__m128i*>(p),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
#endif

// Sixteen values to elements, as from_value() rounds them.
NSS_INLINE void store_lanes(double* p, const Lanes<double>& a) { a.store(p); }
NSS_INLINE void store_lanes(float* p, const Lanes<float>& a) { a.store(p); }
template <typename Half>
NSS_INLINE void store_lanes(Half* p, const Lanes<float>& a) {
#if NSS_LANE_BYTES > 16
  if constexpr (Half::kBrain) {
    typedef uint32_t Word __attribute__((vector_size(NSS_LANE_BYTES)));
    typedef long long Packed __attribute__((vector_size(NSS_LANE_BYTES)));
    NSS_EACH(Lanes<float>::kRegisters, const Word raw = (Word)a.r[i];
             const Word rounded =
                 (Word)(a.r[i] != a.r[i]) ? raw | 0x400000u : raw + 0x7fffu + (raw >> 16 & 1u);
             pack_words(p + i * Lanes<float>::kWidth, (Packed)(rounded >> 16)));
  } else {
#if NSS_LANE_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)a.r[0], _MM_FROUND_TO_NEAREST_INT));
#else
    NSS_EACH(2, _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i),
                                 _mm256_cvtps_ph((__m256)a.r[i], _MM_FROUND_TO_NEAREST_INT)));
#endif
  }
#else
  float values[16];
  a.store(values);
  for (int i = 0; i < 16; ++i) p[i] = from_value<Half>(values[i]);
#endif
}
