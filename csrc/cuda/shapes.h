// The shapes of the fused kernels. Only fused_*.cu include this, and each compiles the kernels of
// one distribution.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "kernels.h"

namespace dfa {

// From the largest tile of the batch to the smallest. The last three are for few rows of U.
using LargeShape = Shape<16, 2, 4, 2, 1>;          // 128 rows by a batch of 128
using MediumShape = Shape<8, 2, 4, 2, 1>;          // 128 by 64
using SmallShape = Shape<4, 2, 4, 3, 2>;           // 128 by 32
using SingleShape = Shape<1, 2, 4, 4, 4>;          // 128 by 8
using NarrowShape = Shape<4, 1, 2, 8, 2>;          // 32 by 32
using LargeSplitShape = Shape<16, 1, 8, 1, 4, 8>;  // 16 by 128
using SplitShape = Shape<4, 1, 8, 2, 8, 8>;        // 16 by 32
// Exact sums take twice the registers, and an exact error three times the shared memory.
using ExactNarrowShape = Shape<4, 1, 2, 6, 1>;
using ExactLargeSplitShape = Shape<8, 1, 4, 2, 2, 4>;  // 16 by 64
using ExactSplitShape = Shape<4, 1, 4, 4, 2, 4>;

template <class S, Distribution kDistribution, Operand kOperand>
FusedKernel instance() {
  return {fused<S, kDistribution, kOperand>,
          S::kRows,
          S::kBatch,
          S::kWarps,
          S::kF,
          S::kParts,
          S::kStageColumns,
          S::kOwnStrips,
          S::kTermBytes,
          S::kWarps * S::kSumFloats * 4};
}

template <Distribution kDistribution, Operand kOperand>
FusedKernel instance_of(int shape) {
  constexpr bool kExact = kOperand == Operand::kExact;
  switch (shape) {
    case 0:
      if constexpr (kExact)
        return {};
      else
        return instance<LargeShape, kDistribution, kOperand>();
    case 1:
      return instance<MediumShape, kDistribution, kOperand>();
    case 2:
      return instance<SmallShape, kDistribution, kOperand>();
    case 3:
      return instance<SingleShape, kDistribution, kOperand>();
    case 4:
      return instance<std::conditional_t<kExact, ExactNarrowShape, NarrowShape>, kDistribution,
                      kOperand>();
    case 5:
      return instance<std::conditional_t<kExact, ExactLargeSplitShape, LargeSplitShape>,
                      kDistribution, kOperand>();
    default:
      return instance<std::conditional_t<kExact, ExactSplitShape, SplitShape>, kDistribution,
                      kOperand>();
  }
}

template <Distribution kDistribution>
FusedKernel fused_kernel(Operand operand, int shape) {
  switch (operand) {
    case Operand::kBFloat16:
      return instance_of<kDistribution, Operand::kBFloat16>(shape);
    case Operand::kHalf:
      return instance_of<kDistribution, Operand::kHalf>(shape);
    case Operand::kExact:
      return instance_of<kDistribution, Operand::kExact>(shape);
  }
  throw std::logic_error("dfa_kernels: unknown operand");
}

}  // namespace dfa
