// How the optimizer steps walk through blocks, lines and elements. Compiled once per instruction
// set, after lanes.h; masked_optim_job.h says what it is given.
//
// Sixteen elements at a time. Where they lie side by side in the parameter and in the gradient,
// they are loaded as they are; otherwise they are gathered and scattered one by one. The state lies
// side by side always.

#include "common/optimizer_steps.h"

// Updates elements of one tensor; S is their type in memory, kStates the number of states.
template <typename Rule, int kStates, typename S>
class Updater {
  using V = ValueOf<S>;
  using Row = typename Rule::Row;
  using Shares = typename Rule::template Shares<Lanes<V>>;

 public:
  Updater(const Rule& rule, const TensorUpdate& t, V scale)
      : rule_(rule),
        scale_(scale),
        where_(t.where),
        param_(static_cast<S*>(t.param)),
        grad_(static_cast<const S*>(t.grad)),
        master_(t.master),
        rows_(static_cast<const Row*>(t.row_shares)),
        same_shares_(t.same_shares),
        adjacent_(where_.last().param_stride == 1 && where_.last().grad_stride == 1) {
    for (int k = 0; k < kStates; ++k) states_[k] = static_cast<V*>(t.states[k]);
  }

  // Elements [begin, end) in the order of the state.
  void run(int64_t begin, int64_t end) const {
    int64_t line = begin / where_.width, from = begin % where_.width;
    while (begin < end) {
      const int64_t to = std::min(where_.width, from + end - begin);
      if (where_.across_rows()) {
        across_rows(line, from, to);
      } else {
        along_row(line, from, to);
      }
      begin += to - from;
      from = 0;
      ++line;
    }
  }

 private:
  static constexpr int64_t kShortLine = 512, kAhead = 64;

  // Elements [from, to) of a line that belongs to one row.
  void along_row(int64_t line, int64_t from, int64_t to) const {
    const TunedRows::Place start = where_.line(line);
    const Shares shares = shares_of(rows_ + start.row, 1);
    const int64_t state = line * where_.width;
    int64_t i = from;
    if (adjacent_) {
      const TunedRows::Place following = line + 1 < where_.lines ? where_.line(line + 1) : start;
      for (; i + 16 <= to; i += 16) {
        prefetch(start, following, i, state + i);
        update_adjacent(shares, param_ + start.param + i, grad_ + start.grad + i, state + i);
      }
    }
    for (; i < to; i += 16) {
      update_scattered(shares, std::min<int64_t>(16, to - i), state + i,
                       [&](int64_t j) { return where_.along(start, i + j); });
    }
  }

  // Asks for what comes after element i of a line: of a short one the following line, because rows
  // lie apart and where to go on is more than the processor can foresee; within long ones it looks
  // ahead itself, and asking early only costs.
  NSS_INLINE void prefetch(const TunedRows::Place& line, const TunedRows::Place& following,
                           int64_t i, int64_t state) const {
    const int64_t ahead = where_.width <= kShortLine ? where_.width : kAhead;
    const bool within = i + ahead < where_.width;
    const TunedRows::Place& there = within ? line : following;
    const int64_t later = within ? i + ahead : i + ahead - where_.width;
    __builtin_prefetch(param_ + there.param + later);
    __builtin_prefetch(grad_ + there.grad + later);
    for (int k = 0; k < kStates; ++k) __builtin_prefetch(states_[k] + state + ahead);
  }

  // Elements [from, to) of a line with one element of each row.
  void across_rows(int64_t line, int64_t from, int64_t to) const {
    const TunedRows::Place start = where_.line(line);
    const int64_t state = line * where_.width;
    Shares shares = shares_of(rows_, 1);
    for (int64_t i = from; i < to; i += 16) {
      const int64_t count = std::min<int64_t>(16, to - i);
      if (!same_shares_) shares = shares_of(rows_ + i, count);
      const bool in_order = count == 16 && where_.rows[i + 15] - where_.rows[i] == 15;
      if (adjacent_ && in_order) {
        const TunedRows::Place at = where_.along(start, i);
        update_adjacent(shares, param_ + at.param, grad_ + at.grad, state + i);
      } else {
        update_scattered(shares, count, state + i,
                         [&](int64_t j) { return where_.along(start, i + j); });
      }
    }
  }

  // The shares of `count` rows, one in each lane, or those of one row in all lanes.
  static Shares shares_of(const Row* rows, int64_t count) {
    constexpr int kShares = sizeof(Row) / sizeof(V);
    V lanes[kShares][16] = {};
    for (int64_t j = 0; j < (count == 1 ? 16 : count); ++j) {
      V row[kShares];
      __builtin_memcpy(row, rows + (count == 1 ? 0 : j), sizeof(row));
      for (int k = 0; k < kShares; ++k) lanes[k][j] = row[k];
    }
    Shares shares;
    static_assert(sizeof(shares) == sizeof(lanes));
    __builtin_memcpy(&shares, lanes, sizeof(shares));
    return shares;
  }

  NSS_INLINE void update_adjacent(const Shares& shares, S* param, const S* grad,
                                  int64_t state) const {
    Lanes<V> states[kStates + 1] = {};
    for (int k = 0; k < kStates; ++k) states[k] = Lanes<V>::load(states_[k] + state);
    const Lanes<V> updated =
        cpu::step(rule_, shares, value(param, state), load_lanes(grad), scale_, states);
    store_lanes(param, updated);
    if constexpr (!std::is_same_v<S, V>) {
      if (master_) updated.store(master_ + state);
    }
    for (int k = 0; k < kStates; ++k) states[k].store(states_[k] + state);
  }

  NSS_INLINE Lanes<V> value(const S* param, int64_t state) const {
    if constexpr (!std::is_same_v<S, V>) {
      if (master_) return Lanes<V>::load(master_ + state);
    }
    return load_lanes(param);
  }

  // `count` elements, at most sixteen, of which j lies at place(j).
  template <typename At>
  void update_scattered(const Shares& shares, int64_t count, int64_t state, const At& place) const {
    S params[16] = {}, grads[16] = {};
    for (int64_t j = 0; j < count; ++j) {
      const TunedRows::Place at = place(j);
      params[j] = param_[at.param];
      grads[j] = grad_[at.grad];
    }
    Lanes<V> param = load_lanes(params);
    Lanes<V> states[kStates + 1] = {};
    for (int k = 0; k < kStates; ++k) states[k] = Lanes<V>::load(states_[k] + state, count);
    if constexpr (!std::is_same_v<S, V>) {
      if (master_) param = Lanes<V>::load(master_ + state, count);
    }
    const Lanes<V> updated = cpu::step(rule_, shares, param, load_lanes(grads), scale_, states);
    store_lanes(params, updated);
    for (int64_t j = 0; j < count; ++j) param_[place(j).param] = params[j];
    if constexpr (!std::is_same_v<S, V>) {
      if (master_) updated.store(master_ + state, count);
    }
    for (int k = 0; k < kStates; ++k) states[k].store(states_[k] + state, count);
  }

  const Rule& rule_;
  V scale_;
  const TunedRows& where_;
  S* param_;
  const S* grad_;
  float* master_;
  const Row* rows_;
  bool same_shares_;
  bool adjacent_;
  V* states_[kStates + 1];
};

template <int kStates, template <typename> class Rule>
void update_blocks(const UpdateJob<Rule>& job, int64_t first, int64_t last) {
  const TensorUpdate* t = std::upper_bound(
      job.tensors, job.tensors + job.count, first,
      [](int64_t block, const TensorUpdate& tensor) { return block < tensor.first_block; });
  for (--t; first < last; ++t) {
    const int64_t begin = (first - t->first_block) * kBlockElements;
    const int64_t end = std::min(t->elements, (last - t->first_block) * kBlockElements);
    if (begin >= end) continue;
    with_element(t->element, [&](auto element) {
      using S = decltype(element);
      if constexpr (std::is_same_v<S, double>) {
        Updater<Rule<double>, kStates, S>(job.wide, *t, job.scale).run(begin, end);
      } else {
        Updater<Rule<float>, kStates, S>(job.narrow, *t, job.scale).run(begin, end);
      }
    });
    first = t->first_block + (end + kBlockElements - 1) / kBlockElements;
  }
}

constexpr MaskedOptimLoops kLoops = {
    [](const UpdateJob<Sgd>& job, int64_t first, int64_t last) {
      if (job.wide.momentum != 0) return update_blocks<1>(job, first, last);
      update_blocks<0>(job, first, last);
    },
    [](const UpdateJob<Adamw>& job, int64_t first, int64_t last) {
      if (job.narrow.amsgrad) return update_blocks<3>(job, first, last);
      update_blocks<2>(job, first, last);
    },
};
