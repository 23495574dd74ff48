#include "shapes.h"

namespace dfa {

FusedKernel fused_uniform(Operand operand, int shape) {
  return fused_kernel_of<Distribution::kUniform>(operand, shape);
}

}  // namespace dfa
