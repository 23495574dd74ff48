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
  int rows, batch;              // of a tile
  int warps, fragments, parts;  // of a block; F and PARTS of its shape
  int stage_columns;
  int term_bytes, own_bytes;  // shared memory: a term of the error in a stage, sums and table
  bool groups;                // products of warpgroups, of an error with permuted columns
  bool exact;                 // sums of fp32 numbers

  int threads() const { return 32 * warps; }
  int shared_bytes(int terms) const { return kStages * terms * term_bytes + own_bytes; }
  std::string name() const {
    return std::to_string(rows) + " x " + std::to_string(batch) +
           (parts == 1 ? "" : ", columns in " + std::to_string(parts)) +
           (groups ? ", warpgroups" : "");
  }
};

// The kernel of a shape; its number is the index of the tile. Each distribution's kernels are
// compiled in a file of their own (fused_*.cu, from shapes.h).
constexpr int kShapes = 11;
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

// Cycles of a scheduler that always has an instruction to issue, of one warp. Fitted to 372 timings
// on an H100 (200,000 rows, 1,000 columns, batches of 1 to 1,024, all distributions) with an error
// of 6 % (root mean square of the logarithm). For few rows, for the tile of 16 x 32, and on other
// GPUs they are a guess.
constexpr double kEntryCycles[] = {16.6, 11.3, 3.0};  // to make an entry, by Distribution
static_assert(std::size(kEntryCycles) == kDense);
constexpr double kStripCycles = 46;       // more for a strip of 32 columns
constexpr double kProductCycles = 4.6;    // of an m16n8k16 by mma.sync
constexpr double kLoadCycles = 1.2;       // to read its part of the error
constexpr double kGroupCycles = 3.0;      // of as large a part of a product of warpgroups
constexpr double kGroupStripCycles = 21;  // more to start those of a strip and term
constexpr double kStepCycles = 43;        // of a step
constexpr double kCopyCycles = 31;        // of each copy that a thread starts in it
constexpr double kExactCycles = 1.1;      // to add up a sum of a step, if sums are exact
constexpr double kWriteCycles = 40;       // of 32 elements written
constexpr double kAddCycles = 10;         // more for each further part of the columns: an estimate
constexpr double kWaitingWarps = 0.48;  // of w warps, w / (w + this) of the cycles issue something
constexpr double kLaunchCycles = 5000;  // also of `prepare`, which a 16-bit error may not need

// Cycles the work takes on a GPU of `processors` multiprocessors that hold `resident` blocks each:
// those of the busiest one.
inline double estimated_cycles(const Work& work, const FusedKernel& kernel, int resident,
                               int processors) {
  const auto tiles = [](int64_t total, int64_t size) {
    return static_cast<double>(divide_up(total, size));
  };
  const double items = tiles(work.rows, kernel.rows) * tiles(work.batch, kernel.batch);
  const double busiest = tiles(static_cast<int64_t>(items), processors);
  const double warps = std::min<double>(resident, busiest) * kernel.warps / 4;  // of a scheduler
  // Of one warp and one tile.
  const double strips = tiles(work.columns, kStripColumns * kernel.parts);
  const double entries = strips * 16 * kernel.fragments;  // of a lane
  const double fragments = kernel.batch / kFragmentBatch * work.terms;
  const double products = entries / 8 * fragments;
  const double multiplied =
      kernel.groups
          ? products * kGroupCycles + strips * work.terms * kGroupStripCycles
          : products * kProductCycles + entries / 16 / kernel.fragments * fragments * kLoadCycles;
  const double sums = kernel.exact ? 4.0 * kernel.fragments * (kernel.batch / kFragmentBatch) : 0.0;
  const double copies = kernel.term_bytes / 16.0 / kernel.threads() * work.terms;  // of a step
  const double of_step = kStepCycles + kCopyCycles * copies + kExactCycles * sums;
  const double layers = static_cast<double>(work.layer_rows) / static_cast<double>(work.rows);
  const double batch = static_cast<double>(std::min<int64_t>(work.batch, kernel.batch));
  const double written = layers * 16 * kernel.fragments * batch / 32 / kernel.parts;
  const double made = entries * kEntryCycles[static_cast<int>(work.distribution)];
  const double busy = made + strips * kStripCycles + multiplied +
                      tiles(work.columns, kernel.stage_columns) * of_step +
                      written * (kWriteCycles + kAddCycles * (kernel.parts - 1));
  const int launches = kernel.groups && work.terms == 1 ? 2 : 1;
  return busiest * busy * kernel.warps / 4 * (warps + kWaitingWarps) / warps +
         launches * kLaunchCycles;
}

}  // namespace dfa
