#pragma once

// The launches of class_stats_.

#include <array>
#include <cstddef>
#include <utility>

#include "ops/cuda/class_stats_launch.cuh"
#include "ops/cuda/class_stats_planes.cuh"
#include "ops/cuda/class_stats_pooled.cuh"
#include "ops/cuda/class_stats_rows.cuh"
#include "ops/cuda/class_stats_samples.cuh"

namespace neusemslice::cuda {

// How a site's x becomes sums.
enum class Path { kRows, kWeighted, kSamples, kPlanes };

class ClassStatsLaunch : private SitesLaunch {
 public:
  // `workspace.take<T>(n)` gives room for n values of T; all of it is asked for here.
  template <typename Workspace>
  ClassStatsLaunch(const BatchInput& batch, const SiteInput* sites, int count, Workspace& workspace)
      : SitesLaunch(batch, count, workspace) {
    for (int i = 0; i < count; ++i) {
      const SiteInput& in = sites[i];
      const bool weighted = in.mask || batch.share || batch.weight;
      paths_[i] = in.positions == 1  ? (weighted ? Path::kWeighted : Path::kRows)
                  : in.stride_c == 1 ? Path::kSamples
                                     : Path::kPlanes;
      elements_[i] = in.element;
      selections_[i] = selection_for(selected_statistics(in.state));
      sites_.sites[i] = laid_out(in, paths_[i] != Path::kRows, workspace);
    }
  }

  void run() {
    find_chunks();
    weigh();
    pool();
    accumulate();
    merge_chunks();
  }

 private:
  // Calls launch_part(element, selection, chosen) for the sites on one path, those of one kind at
  // a time.
  template <typename Launch>
  void by_kind(Path path, const Launch& launch_part) {
    for (int e = 0; e < 4; ++e) {
      for (int s = 0; s < static_cast<int>(std::size(kSelections)); ++s) {
        const Element element = static_cast<Element>(e);
        const auto chosen = [&](int i) {
          return paths_[i] == path && elements_[i] == element && selections_[i] == s;
        };
        bool any = false;
        for (int i = 0; i < sites_.count; ++i) any = any || chosen(i);
        if (!any) continue;
        with_element(element, [&](auto value) {
          with_selection(s, [&](auto selected) { launch_part(value, selected, chosen); });
        });
      }
    }
  }

  template <typename Call>
  static void with_selection(int selection, const Call& call) {
    [&]<int... I>(std::integer_sequence<int, I...>) {
      (void)((I == selection && (call(std::integral_constant<unsigned, kSelections[I]>{}), true)) ||
             ...);
    }(std::make_integer_sequence<int, std::size(kSelections)>{});
  }

  void pool() {
    by_kind(Path::kSamples, [&]<typename T>(T, auto selected, const auto& chosen) {
      constexpr unsigned kSelected = decltype(selected)::value & ~kM2;
      const Sites some =
          part(chosen, [&](const Site& s) { return batch_.samples * tiles(s, kVector<T>); });
      launch("samples_kernel", &samples_kernel<T, kSelected>, {blocks_}, kThreads, some);
    });
    by_kind(Path::kPlanes, [&]<typename T>(T, auto selected, const auto& chosen) {
      constexpr unsigned kSelected = decltype(selected)::value & ~kM2;
      const Sites some = part(chosen, [&](const Site& s) {
        const int64_t lanes = batch_.samples * s.state.neurons * plane_lanes(s.positions);
        return blocks_for(lanes, kThreads);
      });
      launch("planes_kernel", &planes_kernel<T, kSelected>, {blocks_}, kThreads, batch_, some);
    });
  }

  void accumulate() {
    const int64_t chunks = rounds(batch_.chunk_room);
    by_kind(Path::kRows, [&]<typename T>(T, auto selected, const auto& chosen) {
      const Sites some = part(chosen, [](const Site& s) { return tiles(s, kVector<T>); });
      launch("rows_kernel", &rows_kernel<T, decltype(selected)::value>, {blocks_, chunks}, kThreads,
             batch_, some);
    });
    by_kind(Path::kWeighted, [&]<typename T>(T, auto, const auto& chosen) {
      const Sites some = part(chosen, [](const Site& s) { return tiles(s, 1); });
      launch("weighted_kernel", &weighted_kernel<DirectSource<T>>, {blocks_, chunks}, kThreads,
             batch_, some, DirectSource<T>());
    });
    const Sites pooled =
        part([&](int i) { return paths_[i] == Path::kSamples || paths_[i] == Path::kPlanes; },
             [](const Site& s) { return tiles(s, 1); });
    launch("weighted_kernel", &weighted_kernel<PooledSource>, {blocks_, chunks}, kThreads, batch_,
           pooled, PooledSource());
  }

  Path paths_[kMaxSites];
  Element elements_[kMaxSites];
  int selections_[kMaxSites];
};

}  // namespace neusemslice::cuda
