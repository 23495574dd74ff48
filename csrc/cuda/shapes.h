// The shapes of the fused kernels. Only fused_*.cu include this, and each compiles the kernels of
// one distribution.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "kernels.h"

namespace dfa {

// From the largest tile of the batch to the smallest; then those for few rows of U; then those of
// warpgroups. A number that an operand does not have is left out.
template <int I, bool kExact>
struct ShapeOf {
  using type = void;
};
#define DFA_SHAPE(NUMBER, EXACT, ...) \
  template <>                         \
  struct ShapeOf<NUMBER, EXACT> {     \
    using type = Shape<__VA_ARGS__>;  \
  }
DFA_SHAPE(0, false, 16, 2, 4, 2, 1);            // 128 rows by a batch of 128
DFA_SHAPE(1, false, 8, 2, 4, 2, 2);             // 128 by 64
DFA_SHAPE(2, false, 4, 2, 4, 3, 2);             // 128 by 32
DFA_SHAPE(3, false, 2, 2, 4, 4, 4);             // 128 by 16
DFA_SHAPE(4, false, 1, 2, 4, 4, 4);             // 128 by 8
DFA_SHAPE(5, false, 4, 1, 2, 8, 2);             // 32 by 32
DFA_SHAPE(6, false, 4, 1, 8, 2, 8, 8);          // 16 by 32
DFA_SHAPE(7, false, 8, 1, 8, 2, 4, 1, true);    // 128 by 64
DFA_SHAPE(8, false, 16, 1, 8, 2, 2, 1, true);   // 128 by 128
DFA_SHAPE(9, false, 16, 1, 16, 1, 2, 1, true);  // 256 by 128
DFA_SHAPE(10, false, 32, 1, 8, 1, 2, 1, true);  // 128 by 256
// Exact sums take twice the registers, and an exact error three times the shared memory.
DFA_SHAPE(1, true, 8, 2, 4, 2, 1);
DFA_SHAPE(2, true, 4, 2, 4, 3, 2);
DFA_SHAPE(4, true, 1, 2, 4, 4, 4);
DFA_SHAPE(5, true, 4, 1, 2, 6, 1);
DFA_SHAPE(6, true, 4, 1, 4, 4, 2, 4);
DFA_SHAPE(7, true, 8, 1, 16, 1, 2, 1, true);  // 256 by 64
DFA_SHAPE(8, true, 16, 1, 8, 1, 2, 1, true, 2);
#undef DFA_SHAPE

template <class S, Distribution kDistribution, Operand kOperand>
FusedKernel instance() {
  return {fused<S, kDistribution, kOperand>,
          S::kRows,
          S::kBatch,
          S::kWarps,
          S::kF,
          S::kParts,
          S::kStageColumns,
          S::kTermBytes,
          S::kSumBytes + (kDistribution == Distribution::kNormal ? Levels::kBytes : 0),
          S::kGroups,
          kOperand == Operand::kExact};
}

template <Distribution kDistribution, Operand kOperand, int I = 0>
FusedKernel instance_of(int shape) {
  if constexpr (I < kShapes) {
    if (shape != I) return instance_of<kDistribution, kOperand, I + 1>(shape);
    using S = typename ShapeOf<I, kOperand == Operand::kExact>::type;
    if constexpr (!std::is_void_v<S>) return instance<S, kDistribution, kOperand>();
  }
  return {};
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
