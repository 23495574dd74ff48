#include "kernels.h"
#include "simd_portable.h"
#include "table.h"

namespace dfa {

const Kernels* kernels_portable() {
  static const Kernels table = make_kernels<Portable>("portable");
  return &table;
}

}  // namespace dfa
