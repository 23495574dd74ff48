#include "shapes.h"

namespace dfa {

FusedKernel fused_rademacher(Operand operand, int shape) {
  return fused_kernel_of<Distribution::kRademacher>(operand, shape);
}

}  // namespace dfa
