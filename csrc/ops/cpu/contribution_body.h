// From sums to the state: how contribution_ walks through classes, samples and neurons. Compiled
// once per instruction set, after contribution_sums.h; contribution_job.h says what it is given.
//
// Products that are not finite are not looked for on the way. They leave the sums of their class
// not finite, and those sixteen neurons of that class are then added again from cleaned copies.

constexpr int64_t kChunkSteps = 64;  // whose sums stay near the first-level cache

template <typename X, typename G>
class Accumulator {
 public:
  explicit Accumulator(const ContributionJob& job)
      : job_(job.classes),
        g_(job.g),
        pooled_(job_.positions > 1),
        rows_(job_.x.stride_c == 1 && g_.stride_c == 1),
        planes_(pooled_ && job_.x.stride_p == 1 && g_.stride_p == 1) {}

  void run(const Block& block) {
    const int64_t whole = rows_ || planes_ ? (block.last - block.first) / kStep : 0;
    for (int64_t k = job_.next_class(block.first_class); k < block.last_class; k = next_) {
      next_ = job_.next_class(k + 1);
      factors_ = factors_of(k);
      for (int64_t s = 0; s < whole; s += kChunkSteps) {
        add_chunk(k, block.first + s * kStep, std::min(kChunkSteps, whole - s));
      }
      for (int64_t c = block.first + whole * kStep; c < block.last; c += kStep) {
        add_step(k, c, std::min(kStep, block.last - c));
      }
    }
  }

 private:
  const X* x_at(const Sample& s, int64_t p, int64_t c) const {
    return element_at<X>(job_, job_.x, s, p, c);
  }
  const G* g_at(const Sample& s, int64_t p, int64_t c) const {
    return element_at<G>(job_, g_, s, p, c);
  }
  Row<X, G> row_at(const Sample& s, int64_t p, int64_t c) const {
    return {x_at(s, p, c), g_at(s, p, c), s.weight};
  }

  // What all neurons of a class are merged with.
  struct Factors {
    double inverse_weight;
    double share;  // of the new samples in all
    float position_share;
  };

  Factors factors_of(int64_t k) const {
    const double weight = job_.class_weight[k];
    return {1 / weight, weight / (job_.state.count[k] + weight),
            static_cast<float>(weight / (job_.state.positions[k] + weight))};
  }

  // Whole steps of one class, whose neurons or positions lie side by side.
  void add_chunk(int64_t k, int64_t c, int64_t steps) {
    const int64_t begin = job_.offsets[k], count = job_.offsets[k + 1] - begin;
    for (int64_t s = 0; s < steps; ++s) class_[s].clear();
    // The sample of this class, or behind it of the next ones.
    const int64_t all = job_.offsets[job_.state.num_classes] - begin;
    const auto sample = [&](int64_t i) -> const Sample& {
      return job_.samples[begin + std::min(i, all - 1)];
    };
    if (planes_) {
      for (int64_t n = 0; n < count; ++n) {
        const Sample &here = sample(n), &following = sample(n + 1);
        for (int64_t s = 0; s < steps; ++s) {
          const int64_t neuron = c + s * kStep;
          const bool more = s + 1 < steps;
          gather_planes<false>(here, neuron, kStep, more ? here : following,
                               more ? neuron + kStep : c, part_[s]);
        }
        for (int64_t s = 0; s < steps; ++s) fold(here, part_[s], class_[s]);
      }
    } else if (pooled_) {
      for (int64_t n = 0; n < count; ++n) {
        const Sample &here = sample(n), &following = sample(n + 1);
        const auto row = [&](int64_t p) {
          const int64_t beyond = std::min(p - here.positions, following.positions - 1);
          return p < here.positions ? row_at(here, p, c) : row_at(following, beyond, c);
        };
        for (int64_t s = 0; s < steps; ++s) part_[s].clear();
        add_all_rows<RowsOf::kPositions, X, G>(here.positions, row, steps, part_);
        for (int64_t s = 0; s < steps; ++s) fold(here, part_[s], class_[s]);
      }
    } else {
      const auto row = [&](int64_t i) { return row_at(sample(i), 0, c); };
      if (job_.weighted) {
        add_all_rows<RowsOf::kWeightedSamples, X, G>(count, row, steps, class_);
      } else {
        add_all_rows<RowsOf::kSamples, X, G>(count, row, steps, class_);
      }
    }
    for (int64_t s = 0; s < steps; ++s) finish(k, c + s * kStep, kStep, class_[s]);
  }

  // Up to sixteen neurons of one class, whatever their strides.
  void add_step(int64_t k, int64_t c, int64_t width) {
    ProductSums sums;
    sums.clear();
    gather<false>(k, c, width, sums);
    finish(k, c, width, sums);
  }

  // As add_chunk. Where `Clean`, products that are not finite become 0 and are counted.
  template <bool Clean>
  void gather(int64_t k, int64_t c, int64_t width, ProductSums& sums) {
    const int64_t begin = job_.offsets[k], end = job_.offsets[k + 1];
    if (!pooled_) {
      const auto row = [&](int64_t i, int64_t neuron) {
        return row_at(job_.samples[begin + i], 0, neuron);
      };
      return gather_rows<Clean, RowsOf::kWeightedSamples>(end - begin, row, c, width, sums);
    }
    ProductSums part;
    for (int64_t n = begin; n < end; ++n) {
      const Sample& sample = job_.samples[n];
      part.clear();
      if (planes_) {
        gather_planes<Clean>(sample, c, width, job_.samples[std::min(n + 1, end - 1)], c, part);
      } else {
        const auto row = [&](int64_t p, int64_t neuron) { return row_at(sample, p, neuron); };
        gather_rows<Clean, RowsOf::kPositions>(sample.positions, row, c, width, part);
      }
      fold(sample, part, sums);
    }
  }

  // Copies both factors of a product of neuron c.
  template <bool Clean>
  void take(const X* x, const G* g, int64_t c, X& x_copy, G& g_copy) const {
    if constexpr (Clean) {
      const double product = static_cast<double>(to_value(*x)) * static_cast<double>(to_value(*g));
      if (!is_finite(product)) {
        // Another thread may count products of the same neuron and another class.
        __atomic_fetch_add(job_.state.nonfinite + c, 1, __ATOMIC_RELAXED);
        x_copy = X{};
        g_copy = G{};
        return;
      }
    }
    x_copy = *x;
    g_copy = *g;
  }

  template <bool Clean, RowsOf Kind, typename F>
  void gather_rows(int64_t rows, const F& row, int64_t c, int64_t width, ProductSums& sums) const {
    X x_copies[2 * kGroup][kStep] = {};
    G g_copies[2 * kGroup][kStep] = {};
    double weights[2 * kGroup] = {};
    for (int64_t i = 0; i < rows; i += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, rows - i);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t j = 0; j < width; ++j) {
          const Row<X, G> from = row(i + r, c + j);
          take<Clean>(from.x, from.g, c + j, x_copies[r][j], g_copies[r][j]);
          weights[r] = from.weight;
        }
      }
      const auto copy = [&](int64_t r) { return Row<X, G>{x_copies[r], g_copies[r], weights[r]}; };
      add_all_rows<Kind, X, G>(count, copy, 1, &sums);
    }
  }

  // Each neuron's positions lie together, or are copied so that they do. `following` and `neuron`
  // are where the reader goes next.
  template <bool Clean>
  void gather_planes(const Sample& sample, int64_t c, int64_t width, const Sample& following,
                     int64_t neuron, ProductSums& sums) {
    const int64_t positions = sample.positions;
    const bool copy = Clean || job_.kept;
    if (copy && x_plane_.size() < static_cast<size_t>(positions)) {
      x_plane_.resize(positions);
      g_plane_.resize(positions);
    }
    for (int64_t i = 0; i < width; ++i) {
      if (copy) {
        for (int64_t p = 0; p < positions; ++p) {
          take<Clean>(x_at(sample, p, c + i), g_at(sample, p, c + i), c + i, x_plane_[p],
                      g_plane_[p]);
        }
        sums.sum[i] = dot_plane(x_plane_.data(), g_plane_.data(), positions, x_plane_.data(),
                                g_plane_.data());
        continue;
      }
      const int64_t later = i + kPlanesAhead;
      const Row<X, G> ahead = later < width
                                  ? row_at(sample, 0, c + later)
                                  : row_at(following, 0, neuron + (later - width) % width);
      sums.sum[i] =
          dot_plane(x_at(sample, 0, c + i), g_at(sample, 0, c + i), positions, ahead.x, ahead.g);
    }
  }

  // Adds one sample's mean over its positions to the sums of its class.
  void fold(const Sample& sample, const ProductSums& part, ProductSums& sums) const {
    const double factor = sample.weight / static_cast<double>(sample.positions);
    const Lanes<double> value = Lanes<double>::load(part.sum) * factor;
    add_to(sums.sum, value);
    add_to(sums.abs, value.magnitude());
  }

  void finish(int64_t k, int64_t c, int64_t width, ProductSums& sums) {
    const ClassState& state = job_.state;
    if (next_ < state.num_classes && width == kStep) {
      prefetch_plane(state.mean, next_ * state.neurons + c);
      prefetch_plane(state.mean_abs, next_ * state.neurons + c);
    }
    if (!Lanes<double>::load(sums.abs).all_finite()) {
      sums.clear();
      gather<true>(k, c, width, sums);
    }
    const int64_t at = k * state.neurons + c;
    if (state.mean) {
      const Lanes<double> found = Lanes<double>::load(sums.sum) * factors_.inverse_weight;
      const Lanes<double> old = Lanes<double>::load(state.mean + at, width);
      (old + (found - old) * factors_.share).store(state.mean + at, width);
    }
    if (state.mean_abs) {
      merge_sums(state.mean_abs, at, width, sums.abs, factors_.inverse_weight,
                 factors_.position_share);
    }
  }

  const ClassJob& job_;
  const Strided& g_;
  bool pooled_;
  bool rows_;
  bool planes_;
  int64_t next_ = 0;
  Factors factors_{};
  std::vector<X> x_plane_;
  std::vector<G> g_plane_;
  ProductSums class_[kChunkSteps];
  ProductSums part_[kChunkSteps];
};

void accumulate(const ContributionJob& job, const Block& block) {
  with_element(job.classes.x.element, [&](auto x) {
    with_element(job.g.element,
                 [&](auto g) { Accumulator<decltype(x), decltype(g)>(job).run(block); });
  });
}
