// Entries of U in a warp's registers, as operands of the tensor cores.
#pragma once

#include "device.h"
#include "fragments.h"

namespace dfa {

// What is multiplied: bf16 or fp16 numbers, or the three bf16 terms of fp32 numbers, which are
// summed more carefully.
enum class Operand { kBFloat16, kHalf, kExact };

// The Philox keys of every round. In constant memory they cost no instruction and no register.
struct RoundKeys {
  uint32_t even[Philox::kRounds], odd[Philox::kRounds];

  RoundKeys() = default;
  explicit RoundKeys(uint64_t seed) {
    for (uint32_t i = 0; i < Philox::kRounds; ++i) {
      even[i] = static_cast<uint32_t>(seed) + i * Philox::kWeyl0;
      odd[i] = static_cast<uint32_t>(seed >> 32) + i * Philox::kWeyl1;
    }
  }
};

DFA_DEVICE uint64_t product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
DFA_DEVICE uint32_t upper(uint64_t x) { return static_cast<uint32_t>(x >> 32); }
DFA_DEVICE uint32_t lower(uint64_t x) { return static_cast<uint32_t>(x); }

// The rounds from one on, of four counter words.
template <int kFirst>
DFA_DEVICE Words4 rounds_from(const RoundKeys& keys, uint32_t c0, uint32_t c1, uint32_t c2,
                              uint32_t c3) {
#pragma unroll
  for (int round = kFirst; round < Philox::kRounds; ++round) {
    const uint64_t p0 = product(Philox::kMultiplier0, c0);
    const uint64_t p1 = product(Philox::kMultiplier1, c2);
    c0 = upper(p1) ^ c1 ^ keys.even[round];
    c1 = lower(p1);
    c2 = upper(p0) ^ c3 ^ keys.odd[round];
    c3 = lower(p0);
  }
  return {{c0, c1, c2, c3}};
}

// The first two rounds split into two parts, which two XORs join. One depends on the lower half of
// the row alone; a thread keeps it for each of its rows. The other depends on the column block and
// the upper half of the row; a thread's rows share it.
struct RowState {
  uint32_t c0, c2, c3;

  DFA_DEVICE void set(const RoundKeys& keys, uint32_t row_low) {
    const uint64_t first = product(Philox::kMultiplier1, row_low);
    const uint64_t second = product(Philox::kMultiplier0, upper(first) ^ keys.even[0]);
    c0 = lower(first) ^ keys.even[1];
    c2 = upper(second) ^ keys.odd[1];
    c3 = lower(second);
  }
};

struct ColumnState {
  uint32_t c0, c1, c2;

  DFA_DEVICE ColumnState(const RoundKeys& keys, uint32_t column_block, uint32_t row_high) {
    const uint64_t first = product(Philox::kMultiplier0, column_block);
    const uint64_t second = product(Philox::kMultiplier1, upper(first) ^ row_high ^ keys.odd[0]);
    c0 = upper(second);
    c1 = lower(second);
    c2 = lower(first);
  }
};

DFA_DEVICE Words4 join(const RoundKeys& keys, const RowState& row, const ColumnState& column) {
  return rounds_from<2>(keys, row.c0 ^ column.c0, column.c1, row.c2 ^ column.c2, row.c3);
}

// The formula of `codebook` before its rounding to bf16. k is bits 4..15 of `bits`; the others are
// those of 2^23 as a float. Differs from entries.h by a few units of fp32.
DFA_DEVICE float normal_unrounded(uint32_t bits) {
  const float p = fmaf(device::as_float(bits), 0x1p-15f, -(257.0f - 0x1p-12f));  // exact
  const float v = device::log2_approximate(fmaf(-p, p, 1.0f));                   // -w
  float g = fmaf(v, Codebook::kC4, -Codebook::kC3);
  g = fmaf(v, g, Codebook::kC2);
  g = fmaf(v, g, -Codebook::kC1);
  g = fmaf(v, g, Codebook::kC0);
  return p * g;
}

// Selectors of `permute` that pick the bits of a word's halves.
struct Halves {
  uint32_t low, high;

  // The same, but kept in registers. The compiler would make a constant again before each use, one
  // instruction per entry; it does not do so with the result of a shuffle.
  DFA_DEVICE Halves kept() const { return {device::shuffle(low, 0), device::shuffle(high, 0)}; }
};

DFA_HOST_DEVICE constexpr Halves halves_of(Distribution distribution) {
  return distribution == Distribution::kUniform ? Halves{0x7414, 0x7434} : Halves{0x7410, 0x7432};
}

// The bf16 patterns of the normal entries of a word's two halves.
DFA_DEVICE uint32_t normal_pair(uint32_t word, const Halves& halves) {
  const uint32_t k = word & 0xfff0fff0u;
  return device::pack_bf16(normal_unrounded(device::permute(k, 0x4b000000u, halves.low)),
                           normal_unrounded(device::permute(k, 0x4b000000u, halves.high)));
}

// (2k - 255) / 256, where k is byte 1 or 3 of a word.
DFA_DEVICE float uniform_value(uint32_t word, uint32_t selector) {
  const uint32_t bits = device::permute(word, 0x47000000u, selector);  // 2^15 + k
  return fmaf(device::as_float(bits), 0x1p-7f, -65791.0f / 256);       // exact
}

// The normal levels in fp32, by k, in shared memory. One of two entries is looked up there and the
// other computed: to look up all would wait for shared memory, to compute all for the schedulers.
// As fp16 operands both are looked up, because a computed one would be rounded twice.
struct Levels {
  static constexpr int kBytes = 4 << Codebook::kBits;

  const char* table;

  // A thread's part of the table. Others may read it after a barrier.
  DFA_DEVICE static void make(char* table, int thread, int threads) {
    for (int k = thread; k < 1 << Codebook::kBits; k += threads) {
      const float level = normal_unrounded(computed_bits(static_cast<uint32_t>(k) << kShift));
      const uint32_t rounded = device::pack_bf16(0.0f, level) & 0xffff0000u;
      reinterpret_cast<uint32_t*>(table)[k] = rounded;
    }
  }

  // Two neighbouring entries of U as tensor-core operands. They are exact in either type.
  template <Operand kOperand>
  DFA_DEVICE uint32_t pair(uint32_t word) const {
    const float high = looked_up(word >> 16);
    if constexpr (kOperand == Operand::kHalf) return device::pack_half(looked_up(word), high);
    return device::pack_bf16(normal_unrounded(computed_bits(word & kMask)), high);
  }

 private:
  static constexpr int kShift = 16 - Codebook::kBits;  // k is bits 4..15 of a half
  static constexpr uint32_t kMask = ((1u << Codebook::kBits) - 1) << kShift;

  DFA_DEVICE static uint32_t computed_bits(uint32_t shifted_k) { return shifted_k | 0x4b000000u; }

  DFA_DEVICE float looked_up(uint32_t half) const {
    return *reinterpret_cast<const float*>(table + (half >> (kShift - 2) & kMask >> (kShift - 2)));
  }
};

// Two neighbouring uniform entries of U as tensor-core operands. They are exact in either type.
template <Operand kOperand>
DFA_DEVICE uint32_t uniform_pair(uint32_t word, const Halves& halves) {
  const float low = uniform_value(word, halves.low), high = uniform_value(word, halves.high);
  return kOperand == Operand::kHalf ? device::pack_half(low, high) : device::pack_bf16(low, high);
}

// A warp's 16 F rows of U, 32 columns at a time, as A operands: a[fragment][step][register].
template <Distribution kDistribution, Operand kOperand, int F>
struct Generator {
  RowState rows[2 * F];
  uint32_t row_high;
  Halves halves;
  Levels levels;

  // `row` is the warp's first row. Its rows do not cross a multiple of 2^32.
  DFA_DEVICE void start(const RoundKeys& keys, uint64_t row, int lane, const char* table) {
    row_high = upper(row);
    if constexpr (kDistribution == Distribution::kUniform) {
      halves = halves_of(kDistribution).kept();
    } else {
      levels.table = table;
    }
#pragma unroll
    for (int i = 0; i < 2 * F; ++i) {
      const int offset = kFragmentRows * (i / 2) + fragment_row(lane, i % 2);
      rows[i].set(keys, lower(row) + static_cast<uint32_t>(offset));
    }
  }

  // Columns 32 k .. 32 k + 31, counted from column block `first_block`. The k of a row must come in
  // runs of at least kRun that begin at multiples of it.
  template <int kRun>
  DFA_DEVICE void make(const RoundKeys& keys, uint32_t first_block, uint32_t k, int lane,
                       uint32_t (&a)[F][2][4]) {
    const ColumnState column(keys, first_block + 4 * k + static_cast<uint32_t>(lane % 4), row_high);
#pragma unroll
    for (int i = 0; i < 2 * F; ++i) {
      const Words4 block = join(keys, rows[i], column);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const uint32_t word = block.word[word_of(step, pair)];
          uint32_t& out = a[i / 2][step][a_register(i % 2, pair)];
          if constexpr (kDistribution == Distribution::kUniform) {
            out = uniform_pair<kOperand>(word, halves);
          } else {
            out = levels.pair<kOperand>(word);
          }
        }
      }
    }
  }
};

// A rademacher block holds 128 columns, a word for each 32. Each lane of a quad makes the block of
// one of the quad's rows and passes its words round.
template <Operand kOperand, int F>
struct Generator<Distribution::kRademacher, kOperand, F> {
  RowState row_state;
  uint32_t row_high;
  Words4 own;

  DFA_DEVICE void start(const RoundKeys& keys, uint64_t row, int lane, const char*) {
    row_high = upper(row);
    const int i = lane % 4 % (2 * F);
    const int offset = kFragmentRows * (i / 2) + fragment_row(lane, i % 2);
    row_state.set(keys, lower(row) + static_cast<uint32_t>(offset));
  }

  template <int kRun>
  DFA_DEVICE void make(const RoundKeys& keys, uint32_t first_block, uint32_t k, int lane,
                       uint32_t (&a)[F][2][4]) {
    if (kRun == 1 || k % (kRun < 4 ? kRun : 4) == 0) {
      own = join(keys, row_state, ColumnState(keys, first_block + k / 4, row_high));
      if (kRun < 4 && k % 4 >= 2) own = {{own.word[2], own.word[3], own.word[0], own.word[1]}};
    }
    if (kRun == 1 ? k % 2 != 0 : k % (kRun < 4 ? kRun : 4) != 0) {
      own = {{own.word[1], own.word[2], own.word[3], own.word[0]}};
    }
    constexpr uint32_t kOne = kOperand == Operand::kHalf ? 0x3c003c00u : 0x3f803f80u;
    const int quad = lane % 4;
#pragma unroll
    for (int i = 0; i < 2 * F; ++i) {
      // Columns 8 quad + 2 j and 8 quad + 2 j + 1 are bits 4 quad + j and 16 + 4 quad + j.
      const uint32_t word = device::shuffle(own.word[0], (lane & ~3) | i) << (12 - 4 * quad);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[i / 2][j / 2][a_register(i % 2, j % 2)] = ((word << (3 - j)) & 0x80008000u) | kOne;
      }
    }
  }
};

}  // namespace dfa
