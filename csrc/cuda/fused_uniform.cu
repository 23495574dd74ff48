#include "shapes.h"

namespace dfa {

FusedKernel fused_uniform(Operand operand, int shape) {
  return operand == Operand::kHalf ? fused_kernel_of<Distribution::kUniform, Operand::kHalf>(shape)
                                   : fused_kernel_of<Distribution::kUniform, Operand::kBFloat16>(shape);
}

}  // namespace dfa
