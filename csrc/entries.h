// Entries of the seeded feedback matrix U, stream v1, for host and device. This is the definition:
// every faster kernel matches it bit for bit.
//
// U has 2^63 rows and 2^34 columns. U[row, column] is a function of (seed, row, column) alone:
//
//   distribution  columns per  entry of column c, from the Philox block of (row, c / columns)
//                 block
//   normal        8            h = halfword c % 8 (low half of a word first); k = h >> 4;
//                              U = codebook(k)
//   uniform       8            same halfword; k = h >> 8; U = sqrt(3) * (2k - 255) / 256
//   rademacher    128          word (c % 128) / 32; in a word column 2i is bit i, column 2i + 1 is
//                              bit 16 + i; U = 1 - 2 * bit
//
// codebook(k), k in 0..4095: equiprobable quantiles of N(0, 1), each a bfloat16 number:
//
//   p = (2k + 1) / 4096 - 1        w = -log2(1 - p * p)
//   codebook(k) = bf16_round_to_nearest_even(p * (C0 + w * (C1 + w * (C2 + w * (C3 + w * C4)))))
//
// The coefficients keep all 4096 exact values at least 2^-16.77 (relative) away from a rounding
// tie, so any fp32 evaluation (contracted or not, log2 within 2^-15) gives the same 4096 numbers.
// SHA-256 of the 4096 little-endian bf16 patterns, k ascending:
//   5ed3a79e706d6115f423a79720ff5fa68f0a6724c3fbd8b75d4e18c361900340
//
// Known answers, seed 0, columns 0..3 (normal: bf16 patterns, uniform: 2k - 255, rademacher: +-1):
//   normal      row 0: 3fab be83 3f3f 3f97     row 1: bfaf 3d2c be2f 3fc7
//   uniform     row 0:  209  -51  139  195     row 1: -213    9  -35  225
//   rademacher  row 0:   -1   -1    1   -1     row 1:   -1   -1    1    1
#pragma once

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "philox.h"

namespace dfa {

enum class Distribution { kNormal, kUniform, kRademacher, kHadamard };

constexpr int kDistributions = 4;
constexpr int kDense = 3;  // the first ones, whose entries are independent

// The facts of a distribution that are not arithmetic. Everything else reads them from here.
struct DistributionFacts {
  const char* name;  // as the operators take it
  int block;         // columns of one Philox block, a multiple of kUnitColumns
  int bits;          // per entry; all 2^bits values are equally likely
  double factor;     // entries are `factor` times numbers that are exact in bf16
};

DFA_HOST_DEVICE constexpr DistributionFacts facts(Distribution distribution) {
  constexpr DistributionFacts of[kDistributions] = {
      {"normal", 8, 12, 1.0},
      {"uniform", 8, 8, 1.7320508075688772},  // sqrt(3)
      {"rademacher", 128, 1, 1.0},
      {"hadamard", 128, 1, 0x1p-10},  // of its signs
  };
  return of[static_cast<int>(distribution)];
}

// Calls `use` with the distribution as a compile-time constant. Dense ones only.
template <class Use>
auto for_distribution(Distribution distribution, const Use& use) {
  using D = Distribution;
  switch (distribution) {
    case D::kNormal:
      return use(std::integral_constant<D, D::kNormal>());
    case D::kUniform:
      return use(std::integral_constant<D, D::kUniform>());
    case D::kRademacher:
      return use(std::integral_constant<D, D::kRademacher>());
    case D::kHadamard:
      break;
  }
  throw std::logic_error("dfa_kernels: no kernel makes entries of this distribution");
}

// Structured feedback is made of blocks of so many rows and columns, defined in
// dfa_kernels/hadamard.py.
constexpr int kHadamardBlock = 1024;

// Kernels count columns in units of 8, the narrowest block.
constexpr int kUnitColumns = 8;
constexpr uint32_t kCodebookSize = 1u << facts(Distribution::kNormal).bits;

struct Codebook {
  static constexpr int kBits = 12;  // of k
  static constexpr float kC0 = 0x1.40ce28p+0f;
  static constexpr float kC1 = 0x1.d4d196p-3f;
  static constexpr float kC2 = 0x1.d99812p-8f;
  static constexpr float kC3 = -0x1.3fc906p-10f;
  static constexpr float kC4 = 0x1.73c782p-15f;
};

// Bit pattern of the bfloat16 nearest to a finite value, ties to even.
DFA_HOST_DEVICE uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

DFA_HOST_DEVICE float bfloat16_value(uint16_t pattern) {
  const uint32_t bits = static_cast<uint32_t>(pattern) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// bf16 pattern of the k-th quantile, 0 <= k < 4096.
DFA_HOST_DEVICE uint16_t codebook(uint32_t k) {
  const float p = static_cast<float>(2 * k + 1) * 0x1p-12f - 1.0f;
  const float w = -log2f(1.0f - p * p);
  const float g =
      Codebook::kC0 +
      w * (Codebook::kC1 + w * (Codebook::kC2 + w * (Codebook::kC3 + w * Codebook::kC4)));
  return bfloat16_bits(p * g);
}

// The upper bits of a column's halfword, as many as the distribution takes.
template <Distribution kDistribution>
DFA_HOST_DEVICE uint32_t halfword_index(uint64_t seed, uint64_t row, uint64_t column) {
  constexpr DistributionFacts kFacts = facts(kDistribution);
  const Words4 block = stream_block(seed, row, static_cast<uint32_t>(column / kFacts.block));
  const uint32_t c = static_cast<uint32_t>(column % kFacts.block);
  return (block.word[c / 2] >> (16 * (c % 2)) & 0xffffu) >> (16 - kFacts.bits);
}

DFA_HOST_DEVICE float normal_entry(uint64_t seed, uint64_t row, uint64_t column) {
  return bfloat16_value(codebook(halfword_index<Distribution::kNormal>(seed, row, column)));
}

// 2k - 255: the entry is sqrt(3) / 256 times this odd integer.
DFA_HOST_DEVICE int uniform_lattice(uint64_t seed, uint64_t row, uint64_t column) {
  return 2 * static_cast<int>(halfword_index<Distribution::kUniform>(seed, row, column)) - 255;
}

DFA_HOST_DEVICE int rademacher_entry(uint64_t seed, uint64_t row, uint64_t column) {
  constexpr int kColumns = facts(Distribution::kRademacher).block;
  const Words4 block = stream_block(seed, row, static_cast<uint32_t>(column / kColumns));
  const uint32_t c = static_cast<uint32_t>(column % kColumns);
  return 1 - 2 * static_cast<int>((block.word[c / 32] >> (c % 32 / 2 + 16 * (c % 2))) & 1u);
}

}  // namespace dfa
