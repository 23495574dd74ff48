// AVX-512 with the bf16 dot product for bf16 errors. Products of bf16 numbers are exact in fp32,
// where they are summed. Subnormal inputs count as zero.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace dfa {

extern const MultiplyKernel kMultiplyAvx512Bf16, kDotAvx512Bf16;
extern const FusedKernel kFusedAvx512Bf16;

const Kernels* kernels_avx512_bf16() {
  const Kernels* const base = kernels_avx512();
  if (base == nullptr || !__builtin_cpu_supports("avx512bf16")) return nullptr;
  static const Kernels table = [base] {
    Kernels k = *base;
    k.name = "avx512_bf16";
    k.multiply_bf16 = kMultiplyAvx512Bf16;
    k.fused_bf16 = kFusedAvx512Bf16;
    k.dot_bf16 = kDotAvx512Bf16;
    return k;
  }();
  return &table;
}

// Measured: Zen 4 multiplies at twice the rate of its fp32 units, Emerald Rapids at half.
bool has_fast_bf16() { return __builtin_cpu_is("amd"); }

}  // namespace dfa

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#include "simd_avx512.h"
#include "tile.h"

namespace dfa {
namespace {

// An element is a pair of columns, both of the tile and of the error.
struct PairOps {
  using Acc = float;
  using Error = uint32_t;
  using Tile = uint32_t;
  static constexpr int kColumns = 2;  // in an element
  using V = __m512;
  static constexpr int kLanes = Avx512::kLanes;
  static constexpr int kMaxBatch = Avx512::kBatchF32;
  static V zero() { return Avx512::zero(); }
  static __m512bh tile(const Tile* p) { return (__m512bh)Avx512::load_bits(p); }
  static __m512bh entries(__m512i pair) { return (__m512bh)pair; }
  static __m512bh error(Error e) { return (__m512bh)Avx512::bits(e); }
  static __m512bh errors(const Error* p) { return (__m512bh)Avx512::load_bits(p); }
  static V fma(__m512bh e, __m512bh u, V acc) { return _mm512_dpbf16_ps(acc, e, u); }
};

}  // namespace

constexpr MultiplyKernel kMultiplyAvx512Bf16 = multiply<Avx512, PairOps>;
constexpr FusedKernel kFusedAvx512Bf16 = fused<Avx512, PairOps>;
constexpr MultiplyKernel kDotAvx512Bf16 = dot<Avx512, PairOps>;

}  // namespace dfa

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
const dfa::Kernels* dfa::kernels_avx512_bf16() { return nullptr; }
bool dfa::has_fast_bf16() { return false; }
#endif
