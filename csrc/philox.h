// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011),
// the block function of stream v1, for host and device.
//
// Stream v1 reads it as
//
//   key     = (seed & 0xffffffff, seed >> 32)
//   counter = (column_block, domain = 0, row & 0xffffffff, row >> 32)
//
// which is torch's at::Philox4_32(seed, subsequence = row, offset = column_block).
//
// Known answers (Random123):
//   counter 00000000 00000000 00000000 00000000  key 00000000 00000000
//        -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8
//   counter ffffffff ffffffff ffffffff ffffffff  key ffffffff ffffffff
//        -> 408f276d 41c83b0e a20bc7c6 6d5451fd
//   counter 243f6a88 85a308d3 13198a2e 03707344  key a4093822 299f31d0
//        -> d16cfe09 94fdcceb 5001e420 24126ea1
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DFA_HOST_DEVICE __host__ __device__ inline
#else
#define DFA_HOST_DEVICE inline
#endif

namespace dfa {

struct Philox {
  static constexpr int kRounds = 10;
  static constexpr uint32_t kMultiplier0 = 0xD2511F53u;  // multiplies counter word 0
  static constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;  // multiplies counter word 2
  static constexpr uint32_t kWeyl0 = 0x9E3779B9u;        // added to key word 0 every round
  static constexpr uint32_t kWeyl1 = 0xBB67AE85u;        // added to key word 1 every round
};

struct Words4 {
  uint32_t word[4];
};

// One block: 128 random bits that depend on nothing but the arguments.
DFA_HOST_DEVICE Words4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0,
                                  uint32_t key1) {
  for (int round = 0; round < Philox::kRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(Philox::kMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(Philox::kMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += Philox::kWeyl0;
    key1 += Philox::kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The block that holds row `row` of column block `column_block`.
DFA_HOST_DEVICE Words4 stream_block(uint64_t seed, uint64_t row, uint32_t column_block) {
  return philox4x32(column_block, 0, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32),
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

}  // namespace dfa
