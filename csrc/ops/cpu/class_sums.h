// What the loops of class_stats_ and contribution_ have in common; see lanes.h for how it is
// included.

template <typename T>
using ValueOf = decltype(to_value(T{}));

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

// The part of a job's input from a sample's position and a neuron on.
template <typename T>
NSS_INLINE const T* element_at(const ClassJob& job, const Strided& input, const Sample& s,
                               int64_t p, int64_t c) {
  return static_cast<const T*>(input.data) + input.at(s.index, job.position(s, p), c);
}

// Asks for what a plane of the state, which may be absent, holds of sixteen neurons.
template <typename T>
NSS_INLINE void prefetch_plane(const T* plane, int64_t at) {
  if (!plane) return;
  for (size_t byte = 0; byte < sizeof(T) * kStep; byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(plane + at) + byte, 1, 2);
  }
}

// Merges sums, given the inverse of their weight, into means over that weight; `share` is that of
// the new in all.
NSS_INLINE void merge_sums(float* plane, int64_t at, int64_t width, const double* sums,
                           double inverse, float share) {
  const Lanes<float> old = Lanes<float>::load(plane + at, width);
  const Lanes<float> now = to_float(Lanes<double>::load(sums) * inverse);
  (old + (now - old) * share).store(plane + at, width);
}
