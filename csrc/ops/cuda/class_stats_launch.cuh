#pragma once

// What the launches of class_stats_ and contribution_ share, for up to kMaxSites sites of one batch
// at once: workspace, chunks, weights, and the merge at the end. Kernels get the table of sites as
// a parameter, so nothing is copied to the device, nothing is waited for, and a captured graph
// holds all of it.

#include <algorithm>

#include "common/elements.h"
#include "ops/cuda/class_stats_chunks.cuh"

namespace neusemslice::cuda {

struct SiteInput {
  ClassState state;
  const void* x;
  Element element;
  const bool* mask;
  int64_t positions;
  int64_t stride_n;
  int64_t stride_p;
  int64_t stride_c;
};

struct BatchInput {
  const int64_t* order;
  const int64_t* offsets;
  const double* share;
  const double* weight;
  int64_t entries;
  int64_t samples;
  int64_t classes;
};

class SitesLaunch {
 protected:
  template <typename Workspace>
  SitesLaunch(const BatchInput& batch, int sites, Workspace& workspace) {
    const int64_t chunks =
        blocks_for(batch.entries, kChunkRows) + std::min(batch.classes, batch.entries);
    // A class of several chunks has more than kChunkRows entries, and so at least half a chunk in
    // each of them.
    const int64_t slots = batch.entries / (kChunkRows / 2);
    const int64_t splits = std::min(batch.classes, batch.entries / (kChunkRows + 1));
    batch_ = {
        batch.order,
        batch.offsets,
        batch.share,
        batch.weight,
        batch.entries,
        batch.samples,
        batch.classes,
        workspace.template take<int64_t>(2),
        workspace.template take<Chunk>(chunks),
        workspace.template take<Split>(splits),
        workspace.template take<int64_t>(batch.classes + 1),
        chunks,
        slots,
        splits,
    };
    sites_.count = sites;
  }

  // A site's workspace: of weights unless each entry is one row that counts once, and of samples
  // reduced to one value unless they have one position.
  template <typename Workspace>
  Site laid_out(const SiteInput& in, bool weighted, Workspace& workspace) const {
    const auto take = [&]<typename T>(T*& plane, int64_t size, bool wanted = true) {
      plane = wanted ? workspace.template take<T>(size) : nullptr;
    };
    const bool pooled = in.positions != 1;
    const unsigned selected = selected_statistics(in.state);
    Site site{};
    site.state = in.state;
    site.count = in.state.count;
    site.counted_positions = in.state.positions;
    site.x = in.x;
    site.mask = in.mask;
    site.positions = in.positions;
    site.stride_n = in.stride_n;
    site.stride_p = in.stride_p;
    site.stride_c = in.stride_c;
    take(site.state.count, batch_.classes);
    take(site.state.positions, batch_.classes);
    take(site.class_weight, batch_.classes);
    take(site.class_positions, batch_.classes);
    take(site.class_first, batch_.classes);
    if (weighted) {
      take(site.entry_weight, batch_.entries);
      take(site.uses, batch_.samples, pooled);
      take(site.kept, batch_.samples * in.positions, in.mask);
      take(site.real, batch_.samples, in.mask);
      take(site.chunk_weight, batch_.chunk_room);
      take(site.chunk_positions, batch_.chunk_room);
      take(site.chunk_first, batch_.chunk_room);
    }
    const int64_t cells = batch_.samples * in.state.neurons;
    take(site.pooled.mean, cells, pooled);
    take(site.pooled.abs, cells, pooled && (selected & kMeanAbs));
    take(site.pooled.active, cells, pooled && (selected & kActive));
    take(site.pooled.max, cells, pooled && (selected & kMax));
    const int64_t partial = batch_.slot_room * in.state.neurons;
    take(site.partial.shift, partial);
    take(site.partial.sum, partial);
    take(site.partial.squares, partial, selected & kM2);
    take(site.partial.abs, partial, selected & kMeanAbs);
    take(site.partial.active, partial, selected & kActive);
    take(site.partial.max, partial, selected & kMax);
    return site;
  }

  // Blocks that cover a site's neurons at `width` per lane.
  static int64_t tiles(const Site& site, int64_t width) {
    return blocks_for(site.state.neurons, width * kWarp);
  }

  static int64_t rounds(int64_t work) { return std::min(work, kMaxGridY); }

  // The sites that `chosen` names by their number, with their blocks side by side; blocks_ is how
  // many those are.
  template <typename Chosen, typename Blocks>
  Sites part(const Chosen& chosen, const Blocks& blocks) {
    Sites found{};
    blocks_ = 0;
    for (int i = 0; i < sites_.count; ++i) {
      if (!chosen(i)) continue;
      Site& site = found.sites[found.count++] = sites_.sites[i];
      site.first_block = blocks_;
      blocks_ += blocks(site);
    }
    return found;
  }

  void find_chunks() {
    launch("chunks_kernel", &chunks_kernel, {1 + sites_.count}, kThreads, batch_, sites_);
  }

  void weigh() {
    const auto weighted = [&](int i) { return sites_.sites[i].entry_weight != nullptr; };
    const Sites masked = part([&](int i) { return sites_.sites[i].mask != nullptr; },
                              [&](const Site&) { return batch_.samples; });
    launch("kept_kernel", &kept_kernel, {blocks_}, kThreads, masked);
    const Sites all =
        part(weighted, [&](const Site&) { return blocks_for(batch_.classes, kRowLanes); });
    if (all.count == 0) return;
    launch("weigh_kernel", &weigh_kernel, {all.count, rounds(batch_.chunk_room)}, kThreads, batch_,
           all);
    launch("class_weights_kernel", &class_weights_kernel, {blocks_}, kThreads, batch_, all);
  }

  void merge_chunks() {
    if (batch_.split_room == 0) return;
    const Sites all = part([](int) { return true; }, [](const Site& s) { return tiles(s, 1); });
    launch("merge_chunks_kernel", &merge_chunks_kernel, {blocks_, rounds(batch_.split_room)},
           kThreads, batch_, all);
  }

  SortedBatch batch_;
  Sites sites_{};
  int64_t blocks_ = 0;
};

}  // namespace neusemslice::cuda
