// From sums to the state: how class_stats_ walks through classes, samples and neurons. Compiled
// once per instruction set, after class_stats_sums.h; class_job.h says what it is given.
//
// Values that are not finite are not looked for on the way. They leave the sums of their class not
// finite, and those sixteen neurons of that class are then added again from cleaned copies.

constexpr int kFew = 8;              // rows of a class that need no accumulators in memory
constexpr int64_t kChunkSteps = 64;  // whose accumulators stay near the first-level cache

template <typename T>
class Accumulator {
  using V = ValueOf<T>;

 public:
  explicit Accumulator(const ClassJob& job)
      : job_(job),
        selected_(selected_statistics(job.state)),
        add_samples_(row_adder<T>(selected_)),
        add_positions_(row_adder<T>(selected_ & ~kM2)),
        add_plane_(plane_adder<T>(selected_ & ~kM2)),
        // One row per sample, and each counts once: its rows can be added without a look at it.
        direct_(job.positions == 1 && !job.weighted),
        rows_(job.x.stride_c == 1 || job.positions == 1) {}

  void run(int64_t first, int64_t last) {
    const int64_t whole = (last - first) / kStep;
    for (int64_t k = job_.next_class(0); k < job_.state.num_classes; k = next_) {
      next_ = job_.next_class(k + 1);
      factors_ = factors_of(k);
      if (job_.x.stride_c != 1 && rows_) {
        for (int64_t c = first; c < last; c += kStep) {
          add_step(k, c, std::min(kStep, last - c));
        }
        continue;
      }
      if (direct_ && job_.offsets[k + 1] - job_.offsets[k] <= kFew) {
        add_few(k, first, whole);
      } else {
        for (int64_t s = 0; s < whole; s += kChunkSteps) {
          const int64_t c = first + s * kStep;
          const int64_t steps = std::min(kChunkSteps, whole - s);
          const bool more = s + steps < whole;
          direct_ ? add_direct(k, c, steps, more ? c + steps * kStep : -1, first)
                  : add_samples(k, c, steps);
        }
      }
      if (const int64_t c = first + whole * kStep; c < last) add_step(k, c, last - c);
    }
  }

 private:
  const T* at(const Sample& s, int64_t p, int64_t c) const {
    return element_at<T>(job_, job_.x, s, p, c);
  }

  // What all neurons of a class are merged with.
  struct Factors {
    double inverse_weight;
    double share;    // of the new samples in all
    double between;  // weight of the squared distance between the two means
    double inverse_positions;
    float position_share;
  };

  Factors factors_of(int64_t k) const {
    const double weight = job_.class_weight[k], positions = job_.class_positions[k];
    const double share = weight / (job_.state.count[k] + weight);
    return {1 / weight, share, job_.state.count[k] * share, 1 / positions,
            static_cast<float>(positions / (job_.state.positions[k] + positions))};
  }

  // Asks for the state of whole steps that are merged next.
  void prefetch_state(int64_t k, int64_t c) const {
    if (k >= job_.state.num_classes) return;
    const int64_t at = k * job_.state.neurons + c;
    prefetch_plane(job_.state.mean, at);
    prefetch_plane(job_.state.m2, at);
    prefetch_plane(job_.state.mean_abs, at);
    prefetch_plane(job_.state.max, at);
    prefetch_plane(job_.state.active, at);
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
    for (int64_t s = 0; s < steps; ++s) {
      chunk_[s].clear();
      set_shift(k, c + s * kStep, kStep, row(0) + s * kStep, chunk_[s]);
    }
    add_samples_(end - begin, row, steps, chunk_);
    for (int64_t s = 0; s < steps; ++s) {
      prefetch_state(next_, c + s * kStep);
      finish(k, c + s * kStep, kStep, chunk_[s]);
    }
  }

  // The same where the class has so few that a step is finished before the next one is begun. Rows
  // and state of the next class are asked for on the way.
  void add_few(int64_t k, int64_t c, int64_t steps) {
    const int64_t begin = job_.offsets[k], count = job_.offsets[k + 1] - begin;
    const T* rows[2 * kFew];
    for (int64_t r = 0; r < count; ++r) rows[r] = at(job_.samples[begin + r], 0, c);
    const int64_t ahead =
        next_ < job_.state.num_classes
            ? std::min<int64_t>(job_.offsets[next_ + 1] - job_.offsets[next_], kFew)
            : 0;
    for (int64_t r = 0; r < ahead; ++r) rows[kFew + r] = at(job_.samples[begin + count + r], 0, c);
    Sums<V> sums;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t neuron = c + s * kStep;
      for (int64_t r = 0; r < ahead; ++r) __builtin_prefetch(rows[kFew + r] + s * kStep, 0, 2);
      prefetch_state(next_, neuron);
      set_shift(k, neuron, kStep, rows[0] + s * kStep, sums);
      add_samples_.few(rows, count, s * kStep, sums);
      finish(k, neuron, kStep, sums);
    }
  }

  // Whole steps of one class, where a sample has several positions or a weight.
  void add_samples(int64_t k, int64_t c, int64_t steps) {
    const int64_t begin = job_.offsets[k], end = job_.offsets[k + 1];
    for (int64_t s = 0; s < steps; ++s) {
      start(k, c + s * kStep, kStep, classes_[s]);
      set_row_shift(classes_[s], chunk_[s]);
    }
    for (int64_t n = begin; n < end; ++n) {
      const Sample& sample = job_.samples[n];
      const Sample& following = job_.samples[std::min(n + 1, end - 1)];
      for (int64_t s = 0; s < steps; ++s) chunk_[s].clear();
      if (rows_) {
        const auto row = [&](int64_t i) {
          return i < sample.positions
                     ? at(sample, i, c)
                     : at(following, std::min(i - sample.positions, following.positions - 1), c);
        };
        add_positions_(sample.positions, row, steps, chunk_);
      } else {
        for (int64_t s = 0; s < steps; ++s) {
          const int64_t neuron = c + s * kStep;
          const T* after = s + 1 < steps ? at(sample, 0, neuron + kStep) : at(following, 0, c);
          gather_planes<false>(sample, neuron, kStep, after, nullptr, chunk_[s]);
        }
      }
      for (int64_t s = 0; s < steps; ++s) fold(sample, chunk_[s], classes_[s]);
    }
    for (int64_t s = 0; s < steps; ++s) finish(k, c + s * kStep, kStep, classes_[s]);
  }

  // Up to sixteen neurons of one class, whatever their strides.
  void add_step(int64_t k, int64_t c, int64_t width) {
    Sums<V> sums;
    start(k, c, width, sums);
    gather<false>(k, c, width, sums);
    finish(k, c, width, sums);
  }

  template <bool Clean>
  void gather(int64_t k, int64_t c, int64_t width, Sums<V>& sums) {
    direct_ ? gather_direct<Clean>(k, c, width, sums) : gather_samples<Clean>(k, c, width, sums);
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
  void gather_direct(int64_t k, int64_t c, int64_t width, Sums<V>& sums) {
    const int64_t begin = job_.offsets[k], end = job_.offsets[k + 1];
    V max[kStep];
    std::fill_n(max, kStep, -std::numeric_limits<V>::infinity());
    T copies[2 * kGroup][kStep] = {};
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
  void gather_samples(int64_t k, int64_t c, int64_t width, Sums<V>& sums) {
    const int64_t begin = job_.offsets[k], end = job_.offsets[k + 1];
    V max[kStep];
    std::fill_n(max, kStep, -std::numeric_limits<V>::infinity());
    Sums<V> row_sums;
    set_row_shift(sums, row_sums);
    for (int64_t n = begin; n < end; ++n) {
      const Sample& sample = job_.samples[n];
      row_sums.clear();
      if (rows_) {
        gather_rows<Clean>(sample, c, width, max, row_sums);
      } else {
        const T* after = at(job_.samples[std::min(n + 1, end - 1)], 0, c);
        gather_planes<Clean>(sample, c, width, after, max, row_sums);
      }
      fold(sample, row_sums, sums);
    }
    if constexpr (Clean) std::copy_n(max, kStep, sums.max);
  }

  template <bool Clean>
  void gather_rows(const Sample& sample, int64_t c, int64_t width, V* max, Sums<V>& sums) {
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

  // Each neuron's positions lie together, or are copied so that they do. `after` is the plane that
  // is read when these are done.
  template <bool Clean>
  void gather_planes(const Sample& sample, int64_t c, int64_t width, const T* after, V* max,
                     Sums<V>& sums) {
    const bool copy = Clean || job_.x.stride_p != 1 || job_.kept;
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
      const int64_t later = i + kPlanesAhead;
      const T* ahead = copy            ? plane
                       : later < width ? plane + kPlanesAhead * job_.x.stride_c
                                       : after + (later - width) * job_.x.stride_c;
      const PlaneSums found = add_plane_(plane, sample.positions, ahead);
      sums.sum[i] = found.sum;
      sums.abs[i] = found.abs;
      sums.active[i] = found.active;
      sums.max[i] = static_cast<V>(found.max);
    }
  }

  // Empty sums of class k.
  void start(int64_t k, int64_t c, int64_t width, Sums<V>& sums) const {
    T first_row[kStep] = {};
    for (int64_t i = 0; i < width; ++i) {
      first_row[i] = *at(job_.samples[job_.offsets[k]], 0, c + i);
    }
    sums.clear();
    set_shift(k, c, width, first_row, sums);
  }

  // Rows share the shift of their class; planes are summed as they are.
  void set_row_shift(const Sums<V>& sums, Sums<V>& rows) const {
    rows_ ? std::copy_n(sums.shift, kStep, rows.shift) : std::fill_n(rows.shift, kStep, V{});
  }

  // Any shift near the mean will do, as long as it is a finite V.
  void set_shift(int64_t k, int64_t c, int64_t width, const T* first_row, Sums<V>& sums) const {
    const Lanes<V> shift = known(k) ? narrow<V>(load_mean(k, c, width)) : load_lanes(first_row);
    shift.zero_unless_finite().store(sums.shift);
  }

  Lanes<double> load_mean(int64_t k, int64_t c, int64_t width) const {
    return Lanes<double>::load(job_.state.mean + k * job_.state.neurons + c, width);
  }

  // Adds one sample's sums over positions to those of its class.
  void fold(const Sample& sample, const Sums<V>& rows, Sums<V>& sums) const {
    const double w = sample.weight;
    const Lanes<double> between =
        widen(Lanes<V>::load(rows.shift)) - widen(Lanes<V>::load(sums.shift));
    const Lanes<double> deviation =
        Lanes<double>::load(rows.sum) / static_cast<double>(sample.positions) + between;
    const Lanes<double> weighted = deviation * w;
    add_to(sums.sum, weighted);
    add_to(sums.squares, weighted * deviation);
    add_to(sums.abs, Lanes<double>::load(rows.abs) * w);
    add_to(sums.active, Lanes<double>::load(rows.active) * w);
    Lanes<V>::load(sums.max).max(Lanes<V>::load(rows.max)).store(sums.max);
  }

  void finish(int64_t k, int64_t c, int64_t width, Sums<V>& sums) {
    // Beyond these, float32 may have lost the small squares or overflowed.
    constexpr double kSmallest = 0x1p-80, kLargest = std::numeric_limits<float>::max();
    const bool squares_matter = direct_ && std::is_same_v<V, float> && (selected_ & kM2);
    // Squares within bounds also say that every value was finite.
    if (!squares_matter || !Lanes<double>::load(sums.squares).all_within(kSmallest, kLargest)) {
      if (!Lanes<double>::load(sums.sum).all_finite()) {
        sums.clear();
        gather<true>(k, c, width, sums);
      }
      if (squares_matter) square_again(k, c, width, kSmallest, kLargest, sums);
    }
    merge(k, c, width, sums);
  }

  // Sums squares again, in float64, where they are out of bounds and not all zero. The square of
  // the sum, at most n times the sum of squares, tells them from zeros where they have vanished.
  void square_again(int64_t k, int64_t c, int64_t width, double smallest, double largest,
                    Sums<V>& sums) const {
    for (int64_t i = 0; i < width; ++i) {
      const double seen = sums.squares[i] + sums.sum[i] * sums.sum[i];
      if (seen == 0 || (seen >= smallest && seen <= largest)) continue;
      sums.squares[i] = exact_squares(k, c + i, sums.shift[i]);
    }
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
  NSS_INLINE void merge(int64_t k, int64_t c, int64_t width, const Sums<V>& sums) const {
    const ClassState& state = job_.state;
    const int64_t at = k * state.neurons + c;
    if (selected_ & kMean) {
      const Lanes<double> sum = Lanes<double>::load(sums.sum);
      const Lanes<double> deviation = sum * factors_.inverse_weight;
      const Lanes<double> old = Lanes<double>::load(state.mean + at, width);
      const Lanes<double> delta = widen(Lanes<V>::load(sums.shift)) + deviation - old;
      (old + delta * factors_.share).store(state.mean + at, width);
      if (selected_ & kM2) {
        const Lanes<double> within = Lanes<double>::load(sums.squares) - sum * deviation;
        const Lanes<double> m2 = Lanes<double>::load(state.m2 + at, width) +
                                 within.max(Lanes<double>{}) + delta * (delta * factors_.between);
        m2.store(state.m2 + at, width);
      }
    }
    const auto merge_share = [&](float* plane, const double* found) {
      merge_sums(plane, at, width, found, factors_.inverse_positions, factors_.position_share);
    };
    if (selected_ & kMeanAbs) merge_share(state.mean_abs, sums.abs);
    if (selected_ & kActive) merge_share(state.active, sums.active);
    if (selected_ & kMax) {
      const Lanes<float> found = to_float(Lanes<V>::load(sums.max));
      Lanes<float>::load(state.max + at, width).max(found).store(state.max + at, width);
    }
  }

  const ClassJob& job_;
  unsigned selected_;
  RowAdder<T> add_samples_;
  RowAdder<T> add_positions_;
  AddPlane<T>* add_plane_;
  int64_t next_ = 0;
  Factors factors_{};
  bool direct_;
  bool rows_;
  std::vector<T> plane_;
  Sums<V> chunk_[kChunkSteps];
  Sums<V> classes_[kChunkSteps];
};

void accumulate(const ClassJob& job, int64_t first, int64_t last) {
  switch (job.x.element) {
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
