// The table in which a kernel finds its work and the places of its results. The host writes it: all
// layers by their first row, then the intervals of rows that they cover together.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../philox.h"
#include "../plan.h"
#include "../projection.h"

namespace dfa {

// A table of at most this many words is a kernel argument. Arguments are copied at the launch, so
// there is nothing to upload, keep alive or synchronise with, also in a CUDA graph. A longer table
// is uploaded to the workspace, through kernel arguments as well.
constexpr int kNearWords = 440;
constexpr int kLayerWords = 5;
constexpr int kIntervalWords = 3;

struct RowTile {
  uint64_t row;
  int64_t rows;
};

struct LayerTable {
  const uint64_t* far;  // null if `near` has it all
  int32_t layers, intervals;
  uint64_t near[kNearWords];

  DFA_HOST_DEVICE uint64_t word(int64_t i) const { return far == nullptr ? near[i] : far[i]; }

  DFA_HOST_DEVICE uint64_t layer_row(int i) const { return word(int64_t{kLayerWords} * i); }
  DFA_HOST_DEVICE uint64_t layer_end(int i) const { return word(int64_t{kLayerWords} * i + 1); }
  // The furthest end of layers 0..i, which never decreases.
  DFA_HOST_DEVICE uint64_t reach(int i) const { return word(int64_t{kLayerWords} * i + 2); }

  DFA_HOST_DEVICE Layer layer(int i) const {
    const uint64_t row = layer_row(i), end = layer_end(i);
    void* const out = reinterpret_cast<void*>(word(int64_t{kLayerWords} * i + 4));
    const uint64_t scale = word(int64_t{kLayerWords} * i + 3);
    Layer layer{row, static_cast<int64_t>(end - row), 0.0, out};
    std::memcpy(&layer.scale, &scale, sizeof scale);
    return layer;
  }

  // The rows of tile `tile`, at most `tile_rows`.
  DFA_HOST_DEVICE RowTile tile(int64_t tile, int tile_rows) const {
    int low = 0, high = intervals;  // the last interval that begins no later
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (static_cast<int64_t>(interval_word(middle, 2)) <= tile ? low : high) = middle;
    }
    const int64_t skipped = (tile - static_cast<int64_t>(interval_word(low, 2))) * tile_rows;
    const int64_t left = static_cast<int64_t>(interval_word(low, 1)) - skipped;
    return {interval_word(low, 0) + static_cast<uint64_t>(skipped),
            left < tile_rows ? left : tile_rows};
  }

  // How many layers begin before `row`. They are the first in the table.
  DFA_HOST_DEVICE int layers_before(uint64_t row) const {
    return first_without([&](int i) { return layer_row(i) < row; });
  }

  // How many layers at the beginning of the table end at `row` or before.
  DFA_HOST_DEVICE int layers_past(uint64_t row) const {
    return first_without([&](int i) { return reach(i) <= row; });
  }

 private:
  // How many layers at the beginning of the table have a property that the others lack.
  template <class Property>
  DFA_HOST_DEVICE int first_without(const Property& property) const {
    int low = 0, high = layers;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (property(middle)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  DFA_HOST_DEVICE uint64_t interval_word(int i, int word_of_it) const {
    return word(int64_t{kLayerWords} * layers + int64_t{kIntervalWords} * i + word_of_it);
  }
};

// The words of the table: the layers of a plan, and the intervals of one that has been cut into
// tiles.
inline std::vector<uint64_t> table_words(const RowPlan& plan, const RowPlan& tiles) {
  std::vector<uint64_t> words;
  words.reserve(kLayerWords * plan.layers().size() + kIntervalWords * tiles.intervals().size());
  for (size_t i = 0; i < plan.layers().size(); ++i) {
    const Layer& layer = plan.layers()[i];
    uint64_t scale;
    std::memcpy(&scale, &layer.scale, sizeof scale);
    words.insert(words.end(), {layer.row_offset, layer.end(), plan.reach()[i], scale,
                               reinterpret_cast<uint64_t>(layer.out)});
  }
  for (const RowPlan::Interval& interval : tiles.intervals()) {
    words.insert(words.end(), {interval.row, static_cast<uint64_t>(interval.rows),
                               static_cast<uint64_t>(interval.first_task)});
  }
  return words;
}

// Fills a table, whose words go to new memory on the device if they are many.
void set_table(const RowPlan& plan, const RowPlan& tiles, const Allocate& allocate,
               void* cuda_stream, LayerTable& table);

}  // namespace dfa
