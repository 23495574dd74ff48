// The compiled fused kernels, and what a projection costs with each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>

#include "fused.h"

namespace dfa {

// One compiled kernel, or none.
struct FusedKernel {
  void (*kernel)(FusedParameters);
  int rows, batch;                // of a tile
  int warps, fragments, parts;    // of a block; F and PARTS of its shape
  int stage_columns, own_strips;  // strips of 32 of these columns for each warp
  int term_bytes, sum_bytes;      // shared memory: a term of the error in a stage, staged sums

  int threads() const { return 32 * warps; }
  int shared_bytes(int terms) const { return kStages * terms * term_bytes + sum_bytes; }
  std::string name() const {
    return std::to_string(rows) + " x " + std::to_string(batch) +
           (parts == 1 ? "" : ", columns in " + std::to_string(parts));
  }
};

// The kernel of a shape; its number is the index of the tile. Each distribution's kernels are
// compiled in a file of their own (fused_*.cu, from shapes.h).
constexpr int kShapes = 7;
template <Distribution kDistribution>
FusedKernel fused_kernel(Operand operand, int shape);

// Defined where the template is not, or every file would compile the kernels of all distributions.
FusedKernel fused_kernel(Distribution distribution, Operand operand, int shape);

struct Work {
  Distribution distribution;
  int64_t rows;        // of U, in the union of the layers
  int64_t layer_rows;  // the sum of the layers' sizes
  int64_t batch;
  int64_t columns;
  int terms;
};

// Issue slots counted in the compiled loops (tests/packaging/test_cuda_build.py prints them).
struct GeneratorSlots {
  double entry;       // per entry made
  double wide_block;  // to make the blocks of a warp, where a block is wider than a strip
};
constexpr GeneratorSlots kGeneratorSlots[] = {{16, 0}, {8, 0}, {3, 70}};  // by Distribution
static_assert(std::size(kGeneratorSlots) == kDense);
constexpr double kStepSlots = 65, kCopySlots = 8;  // of a step, of each copy a thread starts in it
// Cycles of a scheduler's tensor core per m16n8k16 by mma.sync on sm_90: an estimate, not measured.
constexpr double kMatrixCycles = 6;
// Issue slots per 32 elements written, also an estimate, as are the constants below.
constexpr double kWriteSlots = 8;
constexpr double kAddSlots = 2;  // more for each further part of the columns
// Warps with which a scheduler issues every cycle, and cycles to fill and drain a tile.
constexpr double kEnoughWarps = 2;
constexpr double kTileCycles = 2000;

// Cycles the work takes on a GPU of `processors` multiprocessors that hold `resident` blocks each:
// the larger of issued instructions and tensor-core time, times the tiles of the busiest one.
inline double estimated_cycles(const Work& work, const FusedKernel& kernel, int resident,
                               int processors) {
  const auto tiles = [](int64_t total, int64_t size) {
    return static_cast<double>(divide_up(total, size));
  };
  const double items = tiles(work.rows, kernel.rows) * tiles(work.batch, kernel.batch);
  const double busiest = tiles(static_cast<int64_t>(items), processors);
  const double blocks = std::min<double>(resident, busiest);
  const double schedulers_warps = blocks * kernel.warps / 4;
  // Of one warp and one tile.
  const double entries =
      tiles(work.columns, kStripColumns * kernel.parts) * 16 * kernel.fragments;  // of a lane
  const double fragments = kernel.batch / kFragmentBatch;
  const double matrix = entries / 8 * fragments * work.terms;  // mma instructions
  const double loads = entries / 16 / kernel.fragments * fragments * work.terms;
  const double layers = static_cast<double>(work.layer_rows) / static_cast<double>(work.rows);
  const double write_slots = (kWriteSlots + kAddSlots * (kernel.parts - 1)) / kernel.parts;
  const double writes = layers * 16 * kernel.fragments * kernel.batch / 32 * write_slots;
  const double steps = tiles(work.columns, kernel.stage_columns);
  const double copies = kernel.term_bytes / 16.0 / kernel.threads() * work.terms;  // of a step
  const GeneratorSlots& slots = kGeneratorSlots[static_cast<int>(work.distribution)];
  const int run = kernel.parts == 1 ? 4 : std::min(4, kernel.own_strips);  // strips per wide block
  const double made =
      entries * slots.entry + entries / 16 / kernel.fragments / run * slots.wide_block;
  const double issued = made + matrix + loads + steps * (kStepSlots + kCopySlots * copies) + writes;
  const double busy = std::max(issued, matrix * kMatrixCycles) * kernel.warps / 4;
  return busiest * (busy / std::min(1.0, schedulers_warps / kEnoughWarps) + kTileCycles / blocks);
}

}  // namespace dfa
