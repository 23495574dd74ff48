#include "shapes.h"

namespace dfa {
template FusedKernel fused_kernel<Distribution::kRademacher>(Operand, int);
}  // namespace dfa
