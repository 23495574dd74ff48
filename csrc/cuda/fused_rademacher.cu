#include "shapes.h"

namespace dfa {

FusedKernel fused_rademacher(Operand operand, int shape) {
  return operand == Operand::kHalf ? fused_kernel_of<Distribution::kRademacher, Operand::kHalf>(shape)
                                   : fused_kernel_of<Distribution::kRademacher, Operand::kBFloat16>(shape);
}

}  // namespace dfa
