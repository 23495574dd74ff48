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

// Philox for kLanes blocks at once. store_blocks() writes the block of lane l to slot
// (l % 4) * (kLanes / 4) + l / 4. The counters are therefore assigned to lanes by the inverse.
// `domain` is their second word.
template <class S>
class BlockLanes {
 public:
  using W = typename S::W;

  explicit BlockLanes(uint64_t seed, uint32_t domain = 0) : seed_(seed), domain_(domain) {
    for (int slot = 0; slot < S::kLanes; ++slot) *lane(0, slot) = static_cast<uint64_t>(slot);
    for (int g = 0; g < 2; ++g) run_[g] = S::load(counter_[0][g]);
  }

  // Slots hold consecutive column blocks of one row.
  void set_run(uint64_t row, uint32_t column_block) {
    for (int g = 0; g < 2; ++g) {
      x0_[g] = S::add(run_[g], S::set(column_block));
      x2_[g] = S::set(static_cast<uint32_t>(row));
      x3_[g] = S::set(row >> 32);
    }
  }

  // Each slot in turn holds the row and the column block that `next()` returns.
  template <class Next>
  void set_each(const Next& next) {
    for (int slot = 0; slot < S::kLanes; ++slot) {
      const auto [row, column_block] = next();
      *lane(0, slot) = column_block;
      *lane(1, slot) = static_cast<uint32_t>(row);
      *lane(2, slot) = row >> 32;
    }
    for (int g = 0; g < 2; ++g) {
      x0_[g] = S::load(counter_[0][g]);
      x2_[g] = S::load(counter_[1][g]);
      x3_[g] = S::load(counter_[2][g]);
    }
  }

  // words[4 * slot + i]: word i of the slot's block.
  void words(uint32_t* words) const {
    W x0[2] = {x0_[0], x0_[1]}, x1[2] = {S::set(domain_), S::set(domain_)};
    W x2[2] = {x2_[0], x2_[1]}, x3[2] = {x3_[0], x3_[1]};
    uint32_t key0 = static_cast<uint32_t>(seed_), key1 = static_cast<uint32_t>(seed_ >> 32);
    const W m0 = S::set(Philox::kMultiplier0), m1 = S::set(Philox::kMultiplier1);
#pragma GCC unroll 10
    for (int round = 0; round < Philox::kRounds; ++round) {
      const W k0 = S::set(key0), k1 = S::set(key1);
      for (int g = 0; g < 2; ++g) {
        const W product0 = S::mul(x0[g], m0), product1 = S::mul(x2[g], m1);
        x0[g] = S::xor3(S::high(product1), x1[g], k0);
        x1[g] = product1;
        x2[g] = S::xor3(S::high(product0), x3[g], k1);
        x3[g] = product0;
      }
      key0 += Philox::kWeyl0;
      key1 += Philox::kWeyl1;
    }
    S::store_blocks(words, S::merge(x0[0], x0[1]), S::merge(x1[0], x1[1]), S::merge(x2[0], x2[1]),
                    S::merge(x3[0], x3[1]));
  }

 private:
  uint64_t* lane(int word, int slot) {
    constexpr int kQuads = S::kLanes / 4;
    const int lane = slot % kQuads * 4 + slot / kQuads;
    return &counter_[word][lane % 2][lane / 2];
  }

  uint64_t seed_;
  uint32_t domain_;
  uint64_t counter_[3][2][S::kLanes / 2];
  W run_[2], x0_[2], x2_[2], x3_[2];
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
  BlockLanes<S> lanes(spec.seed);
  uint32_t words[4 * S::kLanes] = {};
  Out clipped[S::kLanes * kColumns];
  while (row < spec.rows) {
    const int64_t chunk_row = row, chunk_block = block;
    const auto next = [&] {
      const BlockOfRow current{spec.row + static_cast<uint64_t>(row), static_cast<uint32_t>(block)};
      if (++block == end_block) {
        block = first_block;
        ++row;
      }
      return current;
    };
    if (block + S::kLanes <= end_block) {
      lanes.set_run(spec.row + static_cast<uint64_t>(row), static_cast<uint32_t>(block));
      block += S::kLanes;
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
    if (column >= begin && column + S::kLanes * kColumns <= end) {
      entries.store(words, S::kLanes, out + (column - begin));
      continue;
    }
    entries.store(words, S::kLanes, clipped);
    int64_t r = chunk_row, b = chunk_block;
    for (int slot = 0; slot < S::kLanes && r < spec.rows; ++slot) {
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
