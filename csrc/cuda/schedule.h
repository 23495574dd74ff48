// Which work there is and where its results go, found by the kernel itself in a table that the host
// writes: all layers by their first row, then the intervals of rows that they make up together.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../philox.h"
#include "../plan.h"

namespace dfa {

// Words of a table that travel as kernel arguments: copied at the launch, so that there is nothing
// to upload, to keep alive or to synchronise with, in a CUDA graph or out of it. A longer table is
// written to the workspace, also from kernel arguments.
constexpr int kNearWords = 440;
constexpr int kLayerWords = 5;
constexpr int kIntervalWords = 3;

struct LayerEntry {
  uint64_t row, end;  // rows of U
  double scale;
  uint64_t out;  // address of [M, end - row]
};

struct RowTile {
  uint64_t row;
  int64_t rows;
};

struct LayerTable {
  const uint64_t* far;  // null: `near` has it all
  int32_t layers, intervals;
  uint64_t near[kNearWords];

  DFA_HOST_DEVICE uint64_t word(int64_t i) const { return far == nullptr ? near[i] : far[i]; }

  DFA_HOST_DEVICE uint64_t layer_row(int i) const { return word(int64_t{kLayerWords} * i); }
  DFA_HOST_DEVICE uint64_t layer_end(int i) const { return word(int64_t{kLayerWords} * i + 1); }
  // The furthest end of layers 0..i, which never decreases.
  DFA_HOST_DEVICE uint64_t reach(int i) const { return word(int64_t{kLayerWords} * i + 2); }

  DFA_HOST_DEVICE LayerEntry layer(int i) const {
    LayerEntry entry{layer_row(i), layer_end(i), 0.0, word(int64_t{kLayerWords} * i + 4)};
    const uint64_t scale = word(int64_t{kLayerWords} * i + 3);
    std::memcpy(&entry.scale, &scale, sizeof scale);
    return entry;
  }

  // The rows of tile `tile`, of `tile_rows` rows at most.
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

  // How many layers begin before `row`; they are the first ones.
  DFA_HOST_DEVICE int layers_before(uint64_t row) const {
    int low = 0, high = layers;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (layer_row(middle) < row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

 private:
  DFA_HOST_DEVICE uint64_t interval_word(int i, int word_of_it) const {
    return word(int64_t{kLayerWords} * layers + int64_t{kIntervalWords} * i + word_of_it);
  }
};

// The words of the table of a plan that has been cut into tiles.
inline std::vector<uint64_t> table_words(const RowPlan& plan) {
  std::vector<uint64_t> words;
  words.reserve(kLayerWords * plan.ranges().size() + kIntervalWords * plan.intervals().size());
  for (size_t i = 0; i < plan.ranges().size(); ++i) {
    const Range& range = plan.ranges()[i];
    uint64_t scale;
    std::memcpy(&scale, &range.scale, sizeof scale);
    words.insert(words.end(),
                 {range.row_offset, range.row_offset + static_cast<uint64_t>(range.size),
                  plan.reach()[i], scale, reinterpret_cast<uint64_t>(range.out)});
  }
  for (const RowPlan::Interval& interval : plan.intervals()) {
    words.insert(words.end(), {interval.row, static_cast<uint64_t>(interval.rows),
                               static_cast<uint64_t>(interval.first_task)});
  }
  return words;
}

}  // namespace dfa
