#include "shapes.h"

namespace dfa {

FusedKernel fused_normal(Operand operand, int shape) {
  return fused_kernel_of<Distribution::kNormal>(operand, shape);
}

}  // namespace dfa
