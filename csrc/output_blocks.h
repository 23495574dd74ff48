// Which blocks of structured feedback a projection makes, and which layers take their rows.
#pragma once

#include <algorithm>
#include <vector>

#include "plan.h"

namespace dfa {

// The output blocks that layers read, in rising order.
class OutputBlocks {
 public:
  explicit OutputBlocks(const std::vector<Layer>& layers)
      : blocks_(whole(layers)), layers_(layers) {
    blocks_.cut(kHadamardBlock);
  }

  int64_t count() const { return blocks_.tasks(); }
  int64_t written() const { return layers_.written(); }
  uint64_t block(int64_t index) const { return blocks_.task(index).row / kHadamardBlock; }

  // What a kernel needs to find blocks and their layers itself.
  const RowPlan& blocks() const { return blocks_; }
  const RowPlan& layers() const { return layers_; }

  // A layer's rows in a block: `size` of them, from `place` of the block and `skipped` of the
  // layer.
  struct Part {
    const Layer* layer;
    int64_t place, skipped, size;
  };

  // In the order of the layers' rows.
  void parts(uint64_t block, std::vector<Part>& found) const {
    found.clear();
    const uint64_t row = block * kHadamardBlock;
    layers_.for_each_layer({row, kHadamardBlock},
                           [&](const Layer& layer, uint64_t begin, uint64_t end) {
                             found.push_back({&layer, static_cast<int64_t>(begin - row),
                                              static_cast<int64_t>(begin - layer.row_offset),
                                              static_cast<int64_t>(end - begin)});
                           });
    std::reverse(found.begin(), found.end());
  }

 private:
  // The layers with all rows of the blocks that they read some of.
  static std::vector<Layer> whole(std::vector<Layer> layers) {
    constexpr uint64_t kBlock = kHadamardBlock;
    for (Layer& layer : layers) {
      const uint64_t end = (layer.end() + kBlock - 1) / kBlock * kBlock;
      layer.row_offset = layer.row_offset / kBlock * kBlock;
      layer.size = static_cast<int64_t>(end - layer.row_offset);
    }
    return layers;
  }

  RowPlan blocks_, layers_;
};

}  // namespace dfa
