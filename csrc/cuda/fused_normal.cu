#include "shapes.h"

namespace dfa {
template FusedKernel fused_kernel<Distribution::kNormal>(Operand, int);
}  // namespace dfa
