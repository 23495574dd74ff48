#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace dfa {

extern const Kernels kAvx512Table;

const Kernels* kernels_avx512() {
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return runs ? &kAvx512Table : nullptr;
}

}  // namespace dfa

// Everything below is compiled for the set, and so are the templates instantiated at the end of the
// file.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#include "simd_avx512.h"
#include "table.h"

namespace dfa {
// Constant-initialised, so loading the library runs no code that the CPU may lack.
constexpr Kernels kAvx512Table = make_kernels<Avx512>("avx512");
}  // namespace dfa

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
const dfa::Kernels* dfa::kernels_avx512() { return nullptr; }
#endif
