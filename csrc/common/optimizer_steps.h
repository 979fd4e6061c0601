// The new value of a parameter; the gradient arrives multiplied by `scale`. The order of the
// operations, and so the rounding, is that of torch.optim's plain implementation.
//
// Included inside a namespace that has fused(), root(), larger() and chosen() for V: of one element
// in optimizer_math.h, and of sixteen at once in the code of each instruction set, which can inline
// only functions that are its own.

// Products are fused with sums by name, where torch's vectorised kernels fuse them: nothing pulls
// the weights together again, and after a thousand steps the roundings would show as eight units in
// the last place.
template <typename T, typename V>
NSS_HOST_DEVICE V step(const Sgd<T>& rule, const typename Sgd<T>::template Shares<V>& row, V param,
                       V grad, T scale, V* state) {
  V g = scale == T(1) ? grad : grad / scale;
  if (rule.maximize) g = -g;
  if (rule.weight_decay != 0) g = fused(rule.weight_decay, param, g);
  if (rule.momentum != 0) {
    V& buffer = *state;
    buffer = chosen(row.first, g, fused(rule.gain, g, buffer * rule.momentum));
    g = rule.nesterov ? fused(rule.momentum, buffer, g) : buffer;
  }
  return fused(-row.lr, g, param);
}

template <typename T, typename V>
NSS_HOST_DEVICE V step(const Adamw<T>& rule, const typename Adamw<T>::template Shares<V>& row,
                       V param, V grad, T scale, V* state) {
  V g = scale == T(1) ? grad : grad / scale;
  if (rule.maximize) g = -g;
  if (rule.coupled_decay != 0) g = fused(rule.coupled_decay, param, g);
  V& m = state[0];
  V& v = state[1];
  // The form of the interpolation that is exact at the nearer end.
  m = rule.forget1 < T(0.5) ? m + (g - m) * rule.forget1 : g - (g - m) * (T(1) - rule.forget1);
  v = v * rule.keep2 + g * rule.forget2 * g;
  V bound = v;
  if (rule.amsgrad) bound = state[2] = larger(v, state[2]);
  const V denominator = root(bound) / row.root_correction2 + rule.eps;
  return param * row.keep - row.step_size * (m / denominator);
}
