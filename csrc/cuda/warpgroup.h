// The matrix product of a warpgroup, on sm_90a: wgmma with its first operand in registers and its
// second in shared memory.
#pragma once

#include <cstdint>

namespace dfa {
namespace device {

// Whether warpgroups multiply on the GPU that is compiled for.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

// How a warpgroup finds rows of 128 bytes in shared memory, from a row that begins at a multiple of
// 1024 on: 8 rows lie together, and a row's 16-byte pieces are permuted by its number (the swizzle
// of 128 bytes).
__device__ __forceinline__ uint64_t rows_of_128_bytes(const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(from));
  constexpr uint64_t kSwizzle = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle | kEightRows | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

#define DFA_SUMS_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define DFA_SUMS_1 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define DFA_SUMS_2 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define DFA_SUMS_3 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define DFA_SUMS_4 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define DFA_SUMS_5 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define DFA_SUMS_6 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define DFA_SUMS_7 "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define DFA_FOUR_SUMS(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define DFA_16_SUMS(i) \
  DFA_FOUR_SUMS(i), DFA_FOUR_SUMS(i + 1), DFA_FOUR_SUMS(i + 2), DFA_FOUR_SUMS(i + 3)

// Two products of 16 columns, one after the other: sums, A of the first and of the second in
// registers, the places of both B, all by the numbers of their operands.
#define DFA_GROUP_PRODUCT(BATCH, TYPE, SUMS, A0, A1, B0, B1, ...)                            \
  asm volatile(                                                                              \
      "{\n.reg .pred keep;\nsetp.eq.b32 keep, 0, 0;\n"                                       \
      "wgmma.fence.sync.aligned;\n"                                                          \
      "wgmma.mma_async.sync.aligned.m64n" BATCH "k16.f32." TYPE "." TYPE " {" SUMS "}, {" A0 \
      "}, " B0                                                                               \
      ", keep, 1, 1, 0;\n"                                                                   \
      "wgmma.mma_async.sync.aligned.m64n" BATCH "k16.f32." TYPE "." TYPE " {" SUMS "}, {" A1 \
      "}, " B1                                                                               \
      ", keep, 1, 1, 0;\n"                                                                   \
      "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n}\n"              \
      : __VA_ARGS__                                                                          \
      : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(a[1][0]), "r"(a[1][1]),  \
        "r"(a[1][2]), "r"(a[1][3]), "l"(b), "l"(b + 2)                                       \
      : "memory")

// The same of fp16 or bf16 operands.
#define DFA_GROUP_PRODUCT_OF_EITHER(BATCH, ...)    \
  if (is_half) {                                   \
    DFA_GROUP_PRODUCT(BATCH, "f16", __VA_ARGS__);  \
  } else {                                         \
    DFA_GROUP_PRODUCT(BATCH, "bf16", __VA_ARGS__); \
  }

// c[64 x 8 N] += a[64 x 32] * b[32 x 8 N] over the warpgroup. Each warp has 16 rows of a and c,
// laid out as for `multiply_bf16`. b lies in 8 N rows, whose 32 columns begin `byte` bytes into
// them.
template <int N>
__device__ __forceinline__ void multiply_group(float (&c)[N][4], const uint32_t (&a)[2][4],
                                               const char* rows, int byte, bool is_half) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint64_t b = rows_of_128_bytes(rows + byte);
  if constexpr (N == 8) {
    DFA_GROUP_PRODUCT_OF_EITHER("64", DFA_SUMS_0 "," DFA_SUMS_1, "%32,%33,%34,%35",
                                "%36,%37,%38,%39", "%40", "%41", DFA_16_SUMS(0), DFA_16_SUMS(4));
  } else if constexpr (N == 16) {
    DFA_GROUP_PRODUCT_OF_EITHER("128", DFA_SUMS_0 "," DFA_SUMS_1 "," DFA_SUMS_2 "," DFA_SUMS_3,
                                "%64,%65,%66,%67", "%68,%69,%70,%71", "%72", "%73", DFA_16_SUMS(0),
                                DFA_16_SUMS(4), DFA_16_SUMS(8), DFA_16_SUMS(12));
  } else {
    static_assert(N == 32, "no such batch");
    DFA_GROUP_PRODUCT_OF_EITHER("256",
                                DFA_SUMS_0 "," DFA_SUMS_1 "," DFA_SUMS_2 "," DFA_SUMS_3
                                           "," DFA_SUMS_4 "," DFA_SUMS_5 "," DFA_SUMS_6
                                           "," DFA_SUMS_7,
                                "%128,%129,%130,%131", "%132,%133,%134,%135", "%136", "%137",
                                DFA_16_SUMS(0), DFA_16_SUMS(4), DFA_16_SUMS(8), DFA_16_SUMS(12),
                                DFA_16_SUMS(16), DFA_16_SUMS(20), DFA_16_SUMS(24), DFA_16_SUMS(28));
  }
#endif  // nothing on other GPUs, where a kernel with such products is a trap
}

#undef DFA_GROUP_PRODUCT_OF_EITHER
#undef DFA_GROUP_PRODUCT
#undef DFA_16_SUMS
#undef DFA_FOUR_SUMS
#undef DFA_SUMS_0
#undef DFA_SUMS_1
#undef DFA_SUMS_2
#undef DFA_SUMS_3
#undef DFA_SUMS_4
#undef DFA_SUMS_5
#undef DFA_SUMS_6
#undef DFA_SUMS_7

}  // namespace device
}  // namespace dfa
