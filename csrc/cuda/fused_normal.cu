#include "shapes.h"

namespace dfa {

FusedKernel fused_normal(Operand operand, int shape) {
  return operand == Operand::kHalf ? fused_kernel_of<Distribution::kNormal, Operand::kHalf>(shape)
                                   : fused_kernel_of<Distribution::kNormal, Operand::kBFloat16>(shape);
}

}  // namespace dfa
