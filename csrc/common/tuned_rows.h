#pragma once

// Where the elements of a parameter's tuned rows lie, in the parameter, in its gradient and in the
// compact state.

#include <cstdint>

#include "common/host_device.h"

namespace neusemslice {

// Elements are numbered in the order of the state, which is contiguous with the neuron dimension
// reduced to the tuned rows: as `lines` lines of `width` elements, the last axis. A row is a slice
// of the parameter at one index of its neuron dimension. Without a neuron axis all elements belong
// to row 0.
struct TunedRows {
  static constexpr int kMaxAxes = 16;

  struct Axis {
    int64_t size;
    int64_t param_stride;
    int64_t grad_stride;
  };

  // One element, or the begin of a line.
  struct Place {
    int64_t row = 0;  // among the tuned rows; -1 if the parameter has no such row
    int64_t param = 0;
    int64_t grad = 0;
  };

  int axis_count = 0;
  int neuron_axis = -1;
  bool compact_grad = false;      // the gradient has the tuned rows only
  const int64_t* rows = nullptr;  // index of each tuned row in the neuron dimension
  int64_t dimension = 0;          // size of the neuron dimension in the parameter
  int64_t lines = 1;
  int64_t width = 1;
  Axis axes[kMaxAxes] = {};  // the last member, so that those behind axis_count can be left out

  // Appends an axis other than the neurons'; axes that both strides run through become one.
  // False if there is no room left.
  bool append(int64_t size, int64_t param_stride, int64_t grad_stride) {
    if (size == 1) return true;
    if (axis_count > 0 && neuron_axis != axis_count - 1) {
      Axis& last = axes[axis_count - 1];
      if (last.param_stride == size * param_stride && last.grad_stride == size * grad_stride) {
        last = {last.size * size, param_stride, grad_stride};
        return true;
      }
    }
    return push({size, param_stride, grad_stride});
  }

  bool append_neurons(int64_t tuned, int64_t param_stride, int64_t grad_stride) {
    neuron_axis = axis_count;
    return push({tuned, param_stride, grad_stride});
  }

  // To be called once all axes are there.
  void finish() {
    if (axis_count == 0) push({1, 0, 0});
    width = axes[axis_count - 1].size;
    lines = 1;
    for (int a = 0; a < axis_count - 1; ++a) lines *= axes[a].size;
  }

  // Forgets where rows begin and end, for rows that are all of the parameter's.
  void join_rows() {
    const TunedRows apart = *this;
    *this = {};
    for (int a = 0; a < apart.axis_count; ++a) {
      append(apart.axes[a].size, apart.axes[a].param_stride, apart.axes[a].grad_stride);
    }
    finish();
  }

  // Whether a line is of several rows, one element of each.
  NSS_HOST_DEVICE bool across_rows() const { return neuron_axis == axis_count - 1; }
  NSS_HOST_DEVICE const Axis& last() const { return axes[axis_count - 1]; }

  NSS_HOST_DEVICE Place line(int64_t index) const {
    Place place;
    for (int a = axis_count - 2; a > 0; --a) {
      move(place, a, index % axes[a].size);
      index /= axes[a].size;
    }
    if (axis_count > 1) move(place, 0, index);
    return place;
  }

  // Element `index` of the line that begins at `place`.
  NSS_HOST_DEVICE Place along(Place place, int64_t index) const {
    move(place, axis_count - 1, index);
    return place;
  }

 private:
  bool push(Axis axis) {
    if (axis_count == kMaxAxes) return false;
    axes[axis_count++] = axis;
    return true;
  }

  NSS_HOST_DEVICE void move(Place& place, int a, int64_t index) const {
    if (a != neuron_axis) {
      place.param += index * axes[a].param_stride;
      place.grad += index * axes[a].grad_stride;
      return;
    }
    const int64_t row = rows[index];
    if (row < 0 || row >= dimension) {
      place.row = -1;
      return;
    }
    place.row = index;
    place.param += row * axes[a].param_stride;
    place.grad += (compact_grad ? index : row) * axes[a].grad_stride;
  }
};

}  // namespace neusemslice
