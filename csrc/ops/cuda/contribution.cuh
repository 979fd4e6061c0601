#pragma once

// Device code and launches of contribution_, free of torch: class_stats_ of the products x * g,
// each sample's averaged over its positions first. Rows of one position are multiplied where they
// are added up; of others, the products' means are found first, by a group of lanes for each plane
// or, where neurons lie side by side in both operands, by a block for each sample.

#include "ops/cuda/class_stats_launch.cuh"
#include "ops/cuda/class_stats_planes.cuh"
#include "ops/cuda/class_stats_pooled.cuh"

namespace neusemslice::cuda {

constexpr int kProductLoads = 4;  // positions of a lane between their loads and their use

// g beside a site's x.
struct OtherInput {
  const void* data;
  Element element;
  int64_t stride_n;
  int64_t stride_p;
  int64_t stride_c;
};

template <typename x_t, typename g_t>
struct Products {
  const g_t* g;
  int64_t stride_n;
  int64_t stride_p;
  int64_t stride_c;

  explicit Products(const OtherInput& in)
      : g(static_cast<const g_t*>(in.data)),
        stride_n(in.stride_n),
        stride_p(in.stride_p),
        stride_c(in.stride_c) {}

  // In float64, where products of narrower values are exact.
  __device__ double product(const Site& site, int64_t n, int64_t p, int64_t c) const {
    return static_cast<double>(to_value(*site.at<x_t>(n, p, c))) *
           static_cast<double>(to_value(g[n * stride_n + p * stride_p + c * stride_c]));
  }

  // The source of weighted_kernel, for one position.
  __device__ Observed at(const Site& site, int64_t n, int64_t c) const {
    const double value = product(site, n, 0, c);
    if (!is_finite(value)) return {0, 0, 0, -INFINITY, false};
    return {value, magnitude(value), 0, -INFINITY, true};
  }

  // Sum over every step-th of a sample's positions that count, without what is not finite.
  __device__ double add(const Site& site, int64_t n, int64_t c, int64_t first, int64_t step,
                        int64_t& nonfinite) const {
    const int64_t count = site.real_positions(n);
    double sum = 0;
    for (int64_t i = first; i < count; i += step * kProductLoads) {
      double values[kProductLoads];
#pragma unroll
      for (int j = 0; j < kProductLoads; ++j) {
        const int64_t at = i + j * step;
        values[j] = at < count ? product(site, n, site.position(n, at), c) : 0;
      }
#pragma unroll
      for (int j = 0; j < kProductLoads; ++j) {
        const bool finite = is_finite(values[j]);
        if (finite) sum += values[j];
        nonfinite += finite ? 0 : 1;
      }
    }
    return sum;
  }
};

// The source of weighted_kernel, for products whose means were found first.
struct PooledProducts {
  __device__ Observed at(const Site& site, int64_t n, int64_t c) const {
    const double value = site.pooled.mean[n * site.state.neurons + c];
    return {value, magnitude(value), 0, -INFINITY, true};
  }
};

// A group of lanes for each sample's plane of a neuron.
template <typename x_t, typename g_t>
__global__ void __launch_bounds__(kThreads)
    product_planes_kernel(const __grid_constant__ SortedBatch batch,
                          const __grid_constant__ Sites sites, Products<x_t, g_t> products) {
  const Site& site = sites.of_block();
  const int lanes = plane_lanes(site.positions);
  const int lane = warp_lane() % lanes;
  const int64_t plane = ((blockIdx.x - site.first_block) * kThreads + threadIdx.x) / lanes;
  const int64_t n = plane / site.state.neurons, c = plane % site.state.neurons;
  if (n >= batch.samples || site.uses[n] == 0) return;
  int64_t nonfinite = 0;
  NeuronSums sums;
  sums.sum = products.add(site, n, c, lane, lanes, nonfinite);
  count_nonfinite(site.state, c, nonfinite * site.uses[n]);
  sums = across_lanes<kMean>(sums, lanes);
  if (lane != 0) return;
  const double count = static_cast<double>(site.real_positions(n));
  site.pooled.mean[n * site.state.neurons + c] = sums.sum / count;
}

// A block for each sample's 32 neurons; its warps take positions in turn.
template <typename x_t, typename g_t>
__global__ void __launch_bounds__(kThreads)
    product_samples_kernel(const __grid_constant__ Sites sites, Products<x_t, g_t> products) {
  const Site& site = sites.of_block();
  const int64_t tiles = blocks_for(site.state.neurons, kWarp);
  const int64_t n = (blockIdx.x - site.first_block) / tiles;
  const int64_t c = (blockIdx.x - site.first_block) % tiles * kWarp + warp_lane();
  if (site.uses[n] == 0) return;
  int64_t nonfinite = 0;
  double sum[1] = {0};
  if (c < site.state.neurons) {
    sum[0] = products.add(site, n, c, row_lane(), kRowLanes, nonfinite);
    count_nonfinite(site.state, c, nonfinite * site.uses[n]);
  }
  const double total = across_rows(sum, Add());
  if (row_lane() != 0 || c >= site.state.neurons) return;
  const double count = static_cast<double>(site.real_positions(n));
  site.pooled.mean[n * site.state.neurons + c] = total / count;
}

class ContributionLaunch : private SitesLaunch {
 public:
  // As ClassStatsLaunch, of one site.
  template <typename Workspace>
  ContributionLaunch(const BatchInput& batch, const SiteInput& x, const OtherInput& g,
                     Workspace& workspace)
      : SitesLaunch(batch, 1, workspace), g_(g), element_(x.element) {
    sites_.sites[0] = laid_out(x, true, workspace);
    sites_.sites[0].by_sample = true;
  }

  void run() {
    find_chunks();
    weigh();
    with_element(element_, [&]<typename x_t>(x_t) {
      with_element(g_.element, [&]<typename g_t>(g_t) { add(Products<x_t, g_t>(g_)); });
    });
    merge_chunks();
  }

 private:
  template <typename x_t, typename g_t>
  void add(const Products<x_t, g_t>& products) {
    const Site& site = sites_.sites[0];
    if (site.positions == 1) return add_up(products);
    if (site.stride_c == 1 && products.stride_c == 1) {
      launch("product_samples_kernel", &product_samples_kernel<x_t, g_t>,
             {batch_.samples * tiles(site, 1)}, kThreads, sites_, products);
    } else {
      const int64_t lanes = batch_.samples * site.state.neurons * plane_lanes(site.positions);
      launch("product_planes_kernel", &product_planes_kernel<x_t, g_t>,
             {blocks_for(lanes, kThreads)}, kThreads, batch_, sites_, products);
    }
    add_up(PooledProducts());
  }

  template <typename Source>
  void add_up(const Source& source) {
    launch("weighted_kernel", &weighted_kernel<Source>,
           {tiles(sites_.sites[0], 1), rounds(batch_.chunk_room)}, kThreads, batch_, sites_,
           source);
  }

  OtherInput g_;
  Element element_;
};

}  // namespace neusemslice::cuda
