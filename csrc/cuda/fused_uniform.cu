#include "shapes.h"

namespace dfa {
template FusedKernel fused_kernel<Distribution::kUniform>(Operand, int);
}  // namespace dfa
