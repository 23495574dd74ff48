// The tiles there are, and which one a projection takes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "fused.h"

namespace dfa {

// One compiled kernel, or none.
struct FusedKernel {
  void (*kernel)(FusedParameters);
  int rows, errors, warps, fragments, parts;  // of U, of the error; F and PARTS of its shape
  int stage_columns, own_blocks;              // blocks of 32 columns of it for each warp
  int term_bytes, sum_bytes;  // shared memory: of a term of the error in a stage, of staged sums

  int threads() const { return 32 * warps; }
  int shared_bytes(int terms) const { return kStages * terms * term_bytes + sum_bytes; }
  std::string name() const {
    return std::to_string(rows) + " x " + std::to_string(errors) +
           (parts == 1 ? "" : ", columns in " + std::to_string(parts));
  }
};

// From the largest tile of error rows to the smallest; the last three are for few rows of U.
constexpr int kShapes = 7;
using LargeShape = Shape<16, 2, 4, 2, 1>;          // 128 error rows by 128
using MediumShape = Shape<8, 2, 4, 2, 1>;          // 64 by 128
using SmallShape = Shape<4, 2, 4, 3, 2>;           // 32 by 128
using SingleShape = Shape<1, 2, 4, 4, 4>;          // 8 by 128
using NarrowShape = Shape<4, 1, 2, 8, 2>;          // 32 by 32
using LargeSplitShape = Shape<16, 1, 8, 1, 4, 8>;  // 128 by 16
using SplitShape = Shape<4, 1, 8, 2, 8, 8>;        // 32 by 16
// Exact sums take twice the registers, and an exact error three times the shared memory.
using ExactNarrowShape = Shape<4, 1, 2, 6, 1>;
using ExactLargeSplitShape = Shape<8, 1, 4, 2, 2, 4>;  // 64 by 16
using ExactSplitShape = Shape<4, 1, 4, 4, 2, 4>;

template <class S, Distribution kDistribution, Operand kOperand>
FusedKernel fused_kernel() {
  return {fused<S, kDistribution, kOperand>,
          S::kRows,
          S::kErrors,
          S::kWarps,
          S::kF,
          S::kParts,
          S::kStageColumns,
          S::kOwnBlocks,
          S::kTermBytes,
          S::kWarps * S::kSumFloats * 4};
}

template <Distribution kDistribution, Operand kOperand>
FusedKernel fused_kernel_of(int shape) {
  constexpr bool kExact = kOperand == Operand::kExact;
  switch (shape) {
    case 0:
      if constexpr (kExact)
        return {};
      else
        return fused_kernel<LargeShape, kDistribution, kOperand>();
    case 1:
      return fused_kernel<MediumShape, kDistribution, kOperand>();
    case 2:
      return fused_kernel<SmallShape, kDistribution, kOperand>();
    case 3:
      return fused_kernel<SingleShape, kDistribution, kOperand>();
    case 4:
      return fused_kernel<std::conditional_t<kExact, ExactNarrowShape, NarrowShape>, kDistribution,
                          kOperand>();
    case 5:
      return fused_kernel<std::conditional_t<kExact, ExactLargeSplitShape, LargeSplitShape>,
                          kDistribution, kOperand>();
    default:
      return fused_kernel<std::conditional_t<kExact, ExactSplitShape, SplitShape>, kDistribution,
                          kOperand>();
  }
}

template <Distribution kDistribution>
FusedKernel fused_kernel_of(Operand operand, int shape) {
  switch (operand) {
    case Operand::kBFloat16:
      return fused_kernel_of<kDistribution, Operand::kBFloat16>(shape);
    case Operand::kHalf:
      return fused_kernel_of<kDistribution, Operand::kHalf>(shape);
    case Operand::kExact:
      return fused_kernel_of<kDistribution, Operand::kExact>(shape);
  }
  throw std::logic_error("dfa_kernels: unknown operand");
}

// Each is compiled in a file of its own.
FusedKernel fused_normal(Operand operand, int shape);
FusedKernel fused_uniform(Operand operand, int shape);
FusedKernel fused_rademacher(Operand operand, int shape);

struct Work {
  Distribution distribution;
  int64_t rows;        // of U, in the union of the layers
  int64_t layer_rows;  // the sum of the layers' sizes
  int64_t errors;      // rows of the error
  int64_t columns;
  int terms;
};

// Issue slots counted in the compiled loops (tests/packaging/test_cuda_build.py prints them): per entry made,
// by Distribution; of rademacher's besides, to make a warp's blocks of 128 columns; of a step, and
// of each copy that a thread starts in it.
constexpr double kSlots[] = {16, 8, 3};
constexpr double kRademacherBlockSlots = 70;
constexpr double kStepSlots = 65, kCopySlots = 8;
// Cycles of a scheduler's tensor core per m16n8k16 by mma.sync on sm_90: an estimate, not measured.
constexpr double kMatrixCycles = 6;
// Issue slots per 32 elements written: an estimate, as the rest here.
constexpr double kWriteSlots = 8;
constexpr double kAddSlots = 2;  // more for each further part of the columns
// Warps that one scheduler needs to issue every cycle, and cycles to fill and drain a tile.
constexpr double kEnoughWarps = 2;
constexpr double kTileCycles = 2000;

// Cycles the work takes on a GPU of `processors` that hold `resident` blocks each: the larger of
// what is issued and what the tensor cores take, for as many tiles as the busiest processor has.
inline double estimated_cycles(const Work& work, const FusedKernel& kernel, int resident,
                               int processors) {
  const auto tiles = [](int64_t total, int64_t size) {
    return static_cast<double>((total + size - 1) / size);
  };
  const double items = tiles(work.rows, kernel.rows) * tiles(work.errors, kernel.errors);
  const double busiest = tiles(static_cast<int64_t>(items), processors);
  const double blocks = std::min<double>(resident, busiest);
  const double schedulers_warps = blocks * kernel.warps / 4;
  // Of one warp and one tile.
  const double entries =
      tiles(work.columns, kBlock32 * kernel.parts) * 16 * kernel.fragments;  // of a lane
  const double fragments = kernel.errors / kFragmentErrors;
  const double matrix = entries / 8 * fragments * work.terms;  // mma instructions
  const double loads = entries / 16 / kernel.fragments * fragments * work.terms;
  const double layers = static_cast<double>(work.layer_rows) / static_cast<double>(work.rows);
  const double write_slots = (kWriteSlots + kAddSlots * (kernel.parts - 1)) / kernel.parts;
  const double writes = layers * 16 * kernel.fragments * kernel.errors / 32 * write_slots;
  const double steps = tiles(work.columns, kernel.stage_columns);
  const double copies = kernel.term_bytes / 16.0 / kernel.threads() * work.terms;  // of a step
  double made = entries * kSlots[static_cast<int>(work.distribution)];
  if (work.distribution == Distribution::kRademacher) {
    const int run = kernel.parts == 1 ? 4 : std::min(4, kernel.own_blocks);
    made += entries / 16 / kernel.fragments / run * kRademacherBlockSlots;
  }
  const double issued = made + matrix + loads + steps * (kStepSlots + kCopySlots * copies) + writes;
  const double busy = std::max(issued, matrix * kMatrixCycles) * kernel.warps / 4;
  return busiest * (busy / std::min(1.0, schedulers_warps / kEnoughWarps) + kTileCycles / blocks);
}

}  // namespace dfa
