#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace dfa {

extern const Kernels kAvx2Table;

const Kernels* kernels_avx2() {
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return runs ? &kAvx2Table : nullptr;
}

}  // namespace dfa

// Everything below is compiled for the set, and so are the templates instantiated at the end of the
// file.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "simd_avx2.h"
#include "table.h"

namespace dfa {
// Constant-initialised, so loading the library runs no code that the CPU may lack.
constexpr Kernels kAvx2Table = make_kernels<Avx2>("avx2");
}  // namespace dfa

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
const dfa::Kernels* dfa::kernels_avx2() { return nullptr; }
#endif
