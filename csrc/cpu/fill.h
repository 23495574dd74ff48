// The feedback matrix itself, row-major. Lanes are (row, column block) pairs in reading order, so a
// matrix of few columns uses all lanes too, for several rows at once.
#pragma once

#include "convert.h"
#include "vector_entries.h"

namespace dfa {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "halfwords are read back from stored words");

struct BlockOfRow {
  uint64_t row;
  uint32_t column_block;
};

// Philox for kBlocks blocks at once, in kVectors vectors. store_blocks() writes the block of lane l
// to slot (l % 4) * (kLanes / 4) + l / 4 of its vector's. The counters are therefore assigned to
// lanes by the inverse. `domain` is their second word.
template <class S, int kVectors>
class BlockLanes {
 public:
  using W = typename S::W;
  static constexpr int kBlocks = kVectors * S::kLanes;

  explicit BlockLanes(uint64_t seed, uint32_t domain = 0) : seed_(seed), domain_(domain) {
    for (int slot = 0; slot < kBlocks; ++slot) *lane(0, slot) = static_cast<uint64_t>(slot);
    for (int g = 0; g < kGroups; ++g) run_[g] = S::load(counter_[0][g]);
  }

  // Slots hold consecutive column blocks of one row, so half of the first two rounds is the same
  // for all.
  void set_run(uint64_t row, uint32_t column_block) {
    const uint64_t row_low = static_cast<uint32_t>(row);
    const uint64_t product = Philox::kMultiplier1 * row_low;
    const uint32_t c0 = static_cast<uint32_t>(product >> 32) ^ domain_ ^ key0(0);
    const uint64_t next = static_cast<uint64_t>(Philox::kMultiplier0) * c0;
    const W mix0 = S::set(static_cast<uint32_t>(product) ^ key0(1));
    const W mix1 = S::set(static_cast<uint32_t>(row >> 32) ^ key1(0));
    const W mix2 = S::set(static_cast<uint32_t>(next >> 32) ^ key1(1));
    for (int g = 0; g < kGroups; ++g) {
      const W low = S::mul(S::add(run_[g], S::set(column_block)), S::set(Philox::kMultiplier0));
      x1_[g] = S::mul(S::xor2(S::high(low), mix1), S::set(Philox::kMultiplier1));
      x0_[g] = S::xor2(S::high(x1_[g]), mix0);
      x2_[g] = S::xor2(low, mix2);
      x3_[g] = S::set(static_cast<uint32_t>(next));
    }
  }

  // Each slot in turn holds the row and the column block that `next()` returns.
  template <class Next>
  void set_each(const Next& next) {
    for (int slot = 0; slot < kBlocks; ++slot) {
      const auto [row, column_block] = next();
      *lane(0, slot) = column_block;
      *lane(1, slot) = static_cast<uint32_t>(row);
      *lane(2, slot) = row >> 32;
    }
    for (int g = 0; g < kGroups; ++g) {
      x0_[g] = S::load(counter_[0][g]);
      x1_[g] = S::set(domain_);
      x2_[g] = S::load(counter_[1][g]);
      x3_[g] = S::load(counter_[2][g]);
    }
    rounds<0, kFirstRounds>(x0_, x1_, x2_, x3_);
  }

  // words[4 * slot + i]: word i of the slot's block.
  void words(uint32_t* words) const {
    W x0[kGroups], x1[kGroups], x2[kGroups], x3[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      x0[g] = x0_[g];
      x1[g] = x1_[g];
      x2[g] = x2_[g];
      x3[g] = x3_[g];
    }
    rounds<kFirstRounds, Philox::kRounds>(x0, x1, x2, x3);
    for (int g = 0; g < kGroups; g += 2, words += 4 * S::kLanes) {
      S::store_blocks(words, S::merge(x0[g], x0[g + 1]), S::merge(x1[g], x1[g + 1]),
                      S::merge(x2[g], x2[g + 1]), S::merge(x3[g], x3[g + 1]));
    }
  }

 private:
  static constexpr int kGroups = 2 * kVectors;
  static constexpr int kFirstRounds = 2;

  uint32_t key0(int round) const {
    return static_cast<uint32_t>(seed_) + static_cast<uint32_t>(round) * Philox::kWeyl0;
  }
  uint32_t key1(int round) const {
    return static_cast<uint32_t>(seed_ >> 32) + static_cast<uint32_t>(round) * Philox::kWeyl1;
  }

  template <int kBegin, int kEnd>
  void rounds(W (&x0)[kGroups], W (&x1)[kGroups], W (&x2)[kGroups], W (&x3)[kGroups]) const {
    const W m0 = S::set(Philox::kMultiplier0), m1 = S::set(Philox::kMultiplier1);
#pragma GCC unroll 10
    for (int round = kBegin; round < kEnd; ++round) {
      const W k0 = S::set(key0(round)), k1 = S::set(key1(round));
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        const W product0 = S::mul(x0[g], m0), product1 = S::mul(x2[g], m1);
        x0[g] = S::xor3(S::high(product1), x1[g], k0);
        x1[g] = product1;
        x2[g] = S::xor3(S::high(product0), x3[g], k1);
        x3[g] = product0;
      }
    }
  }

  uint64_t* lane(int word, int slot) {
    constexpr int kQuads = S::kLanes / 4;
    const int place = slot % S::kLanes, lane = place % kQuads * 4 + place / kQuads;
    return &counter_[word][slot / S::kLanes * 2 + lane % 2][lane / 2];
  }

  uint64_t seed_;
  uint32_t domain_;
  uint64_t counter_[3][kGroups][S::kLanes / 2];
  W run_[kGroups], x0_[kGroups], x1_[kGroups], x2_[kGroups], x3_[kGroups];  // after kFirstRounds
};

template <class S, class Out>
void store_as(Out* out, typename S::F value) {
  if constexpr (__is_same(Out, float)) {
    S::store(out, value);
  } else if constexpr (__is_same(Out, BFloat16)) {
    S::store_bf16(out, value);
  } else {
    float lanes[S::kLanes];
    S::store(lanes, value);
    for (int i = 0; i < S::kLanes; ++i) out[i] = round_to<Out>(lanes[i]);
  }
}

template <class S, Distribution kDistribution>
struct BlockEntries;

template <class S>
struct BlockEntries<S, Distribution::kNormal> {
  static constexpr int kColumns = facts(Distribution::kNormal).block;
  template <class Out>
  static void store(const uint32_t* words, int blocks, Out* out) {
    for (int i = 0; i < blocks * kColumns; i += S::kLanes) {
      const auto h = S::load_halfwords(words + i / 2);
      store_as<S>(out + i, Normal<S>::as_floats(Normal<S>::even(h)));
    }
  }
  static void store(const uint32_t* words, int blocks, BFloat16* out) {
    for (int i = 0; i < 4 * blocks; i += S::kLanes) {
      const auto w = S::load_bits(words + i);
      S::store_bits(reinterpret_cast<uint32_t*>(out + 2 * i),
                    S::upper_halves(Normal<S>::odd(w), Normal<S>::even(w)));
    }
  }
};

template <class S>
struct BlockEntries<S, Distribution::kUniform> {
  static constexpr int kColumns = facts(Distribution::kUniform).block;
  double factor = facts(Distribution::kUniform).factor;
  template <class Out>
  void store(const uint32_t* words, int blocks, Out* out) const {
    for (int i = 0; i < blocks * kColumns; i += S::kLanes) {
      const auto h = S::load_halfwords(words + i / 2);
      const auto lattice = UniformLattice<S>::as_floats(UniformLattice<S>::even(h));
      if constexpr (__is_same(Out, double)) {
        float lanes[S::kLanes];
        S::store(lanes, lattice);
        for (int j = 0; j < S::kLanes; ++j) out[i + j] = factor * static_cast<double>(lanes[j]);
      } else {
        store_as<S>(out + i, S::times(lattice, S::set1(static_cast<float>(factor))));
      }
    }
  }
};

template <class S>
struct BlockEntries<S, Distribution::kRademacher> {
  static constexpr int kColumns = facts(Distribution::kRademacher).block;
  template <class Out>
  static void store(const uint32_t* words, int blocks, Out* out) {
    uint32_t shifts[32];  // that move each column's bit of a word to the sign
    for (uint32_t c = 0; c < 32; ++c) shifts[c] = 31 - (c / 2 + 16 * (c % 2));
    for (int word = 0; word < 4 * blocks; ++word, out += 32) {
      const auto w = S::bits(words[word]);
      for (int c = 0; c < 32; c += S::kLanes) {
        const auto signs = S::left_each(w, S::load_bits(shifts + c));
        store_as<S>(out + c, S::as_float(S::mask_or(signs, kFloatSign, kFloatOne)));
      }
    }
  }
  static void store(const uint32_t* words, int blocks, BFloat16* out) {
    uint32_t shifts[16];  // columns 2i and 2i + 1 are bits i and 16 + i, so they share a shift
    for (uint32_t i = 0; i < 16; ++i) shifts[i] = 15 - i;
    for (int word = 0; word < 4 * blocks; ++word, out += 32) {
      const auto w = S::bits(words[word]);
      for (int i = 0; i < 16; i += S::kLanes) {
        const auto signs = S::left_each(w, S::load_bits(shifts + i));
        S::store_bits(reinterpret_cast<uint32_t*>(out + 2 * i),
                      S::mask_or(signs, kPairSigns, kPairOnes));
      }
    }
  }
};

template <class S, class Out, class Entries>
void fill_rows(const FillSpec& spec, const Entries& entries) {
  constexpr int64_t kColumns = Entries::kColumns;
  const int64_t begin = spec.column, end = spec.column + spec.columns;
  const int64_t first_block = begin / kColumns, end_block = (end + kColumns - 1) / kColumns;
  int64_t row = 0, block = first_block;
  // Narrow blocks are made in more vectors, so that rounds wait less for each other.
  using Lanes = BlockLanes<S, kColumns == kUnitColumns ? S::kVectors : 1>;
  constexpr int kBlocks = Lanes::kBlocks;
  Lanes lanes(spec.seed);
  uint32_t words[4 * kBlocks] = {};
  Out clipped[kBlocks * kColumns];
  while (row < spec.rows) {
    const int64_t chunk_row = row, chunk_block = block;
    const int64_t left = (spec.rows - row) * (end_block - first_block) - (block - first_block);
    const int used = left < kBlocks ? static_cast<int>(left) : kBlocks;
    const auto next = [&] {
      const BlockOfRow current{spec.row + static_cast<uint64_t>(row), static_cast<uint32_t>(block)};
      if (++block == end_block) {
        block = first_block;
        ++row;
      }
      return current;
    };
    if (block + kBlocks <= end_block) {
      lanes.set_run(spec.row + static_cast<uint64_t>(row), static_cast<uint32_t>(block));
      block += kBlocks;
      if (block == end_block) {
        block = first_block;
        ++row;
      }
    } else {
      lanes.set_each(next);
    }
    lanes.words(words);
    Out* out = static_cast<Out*>(spec.out) + chunk_row * spec.out_stride;
    const int64_t column = chunk_block * kColumns;
    if (column >= begin && column + kBlocks * kColumns <= end) {
      entries.store(words, kBlocks, out + (column - begin));
      continue;
    }
    entries.store(words, used, clipped);
    int64_t r = chunk_row, b = chunk_block;
    for (int slot = 0; slot < used; ++slot) {
      const int64_t from = b * kColumns < begin ? begin - b * kColumns : 0;
      const int64_t to = (b + 1) * kColumns > end ? end - b * kColumns : kColumns;
      __builtin_memcpy(out + (b * kColumns + from - begin), clipped + slot * kColumns + from,
                       static_cast<size_t>(to - from) * sizeof(Out));
      if (++b == end_block) {
        b = first_block;
        ++r;
        out += spec.out_stride;
      }
    }
  }
}

template <class S, class Out>
void fill(const FillSpec& spec) {
  for_distribution(spec.distribution, [&](auto kind) {
    BlockEntries<S, kind> entries;
    if constexpr (kind == Distribution::kUniform) {
      if (spec.lattice) entries.factor = 1;
    }
    fill_rows<S, Out>(spec, entries);
  });
}

}  // namespace
}  // namespace dfa
