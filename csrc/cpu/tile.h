// Tiles of U for the projection. Lanes are rows: a vector holds a column and is stored whole.
#pragma once

#include "vector_entries.h"

namespace dfa {
namespace {

// Philox for S::kVectors vectors of consecutive rows, in 64-bit lanes: even rows in one register,
// odd rows in another. Words are never masked, because the widening multiplication ignores the high
// halves. The first two rounds are mostly shared. They multiply only what depends on the row (once
// per panel) and on the column block (a scalar), because rows do not cross a multiple of 2^32.
template <class S>
class RowBlocks {
 public:
  using W = typename S::W;
  using I = typename S::I;
  static constexpr int kGroups = 2 * S::kVectors;

  RowBlocks(uint64_t seed, uint64_t row) : row_high_(static_cast<uint32_t>(row >> 32)) {
    for (int round = 0; round < Philox::kRounds; ++round) {
      const uint32_t n = static_cast<uint32_t>(round);
      key0_[round] = static_cast<uint32_t>(seed) + n * Philox::kWeyl0;
      key1_[round] = static_cast<uint32_t>(seed >> 32) + n * Philox::kWeyl1;
    }
    for (int g = 0; g < kGroups; ++g) {
      uint64_t low[S::kLanes / 2];
      for (int j = 0; j < S::kLanes / 2; ++j) {
        low[j] = static_cast<uint32_t>(row + g / 2 * S::kLanes + 2 * j + g % 2);
      }
      const W product = S::mul(S::load(low), S::set(Philox::kMultiplier1));
      const W c0 = S::xor2(S::high(product), S::set(key0_[0]));
      const W next = S::mul(c0, S::set(Philox::kMultiplier0));
      round1_low_[g] = product;
      round2_low_[g] = next;
      round2_high_[g] = S::high(next);
    }
  }

  // words[i][v]: word i of block `column_block` for the rows of vector v.
  void words(uint32_t column_block, I (&words)[4][S::kVectors]) const {
    const uint64_t first = static_cast<uint64_t>(Philox::kMultiplier0) * column_block;
    const uint32_t c2 = static_cast<uint32_t>(first >> 32) ^ row_high_ ^ key1_[0];
    const uint64_t second = static_cast<uint64_t>(Philox::kMultiplier1) * c2;
    const W mix0 = S::set(static_cast<uint32_t>(second >> 32) ^ key0_[1]);
    const W mix2 = S::set(static_cast<uint32_t>(first) ^ key1_[1]);
    W x0[kGroups], x1[kGroups], x2[kGroups], x3[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      x0[g] = S::xor2(round1_low_[g], mix0);
      x1[g] = S::set(static_cast<uint32_t>(second));
      x2[g] = S::xor2(round2_high_[g], mix2);
      x3[g] = round2_low_[g];
    }
    const W m0 = S::set(Philox::kMultiplier0), m1 = S::set(Philox::kMultiplier1);
#pragma GCC unroll 8
    for (int round = 2; round < Philox::kRounds; ++round) {
      const W k0 = S::set(key0_[round]), k1 = S::set(key1_[round]);
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) {
        const W product0 = S::mul(x0[g], m0), product1 = S::mul(x2[g], m1);
        x0[g] = S::xor3(S::high(product1), x1[g], k0);
        x1[g] = product1;
        x2[g] = S::xor3(S::high(product0), x3[g], k1);
        x3[g] = product0;
      }
    }
    for (int v = 0; v < S::kVectors; ++v) {
      words[0][v] = S::merge(x0[2 * v], x0[2 * v + 1]);
      words[1][v] = S::merge(x1[2 * v], x1[2 * v + 1]);
      words[2][v] = S::merge(x2[2 * v], x2[2 * v + 1]);
      words[3][v] = S::merge(x3[2 * v], x3[2 * v + 1]);
    }
  }

 private:
  uint32_t row_high_;
  uint64_t key0_[Philox::kRounds], key1_[Philox::kRounds];
  W round1_low_[kGroups], round2_low_[kGroups], round2_high_[kGroups];
};

// Stores columns 2i and 2i + 1 of a vector of rows, as two columns of floats or one of pairs.
template <class S, class Entry>
void store_pair(float* tile, typename S::I words) {
  S::store(tile, Entry::as_floats(Entry::even(words)));
  S::store(tile + 2 * S::kLanes, Entry::as_floats(Entry::odd(words)));
}
template <class S, class Entry>
void store_pair(uint32_t* tile, typename S::I words) {
  S::store_bits(tile, S::upper_halves(Entry::odd(words), Entry::even(words)));
}
template <class S>
void store_signs(float* tile, typename S::I w, int bit) {
  S::store(tile, S::as_float(S::mask_or(S::left(w, 31 - bit), kFloatSign, kFloatOne)));
  S::store(tile + 2 * S::kLanes,
           S::as_float(S::mask_or(S::left(w, 15 - bit), kFloatSign, kFloatOne)));
}
template <class S>
void store_signs(uint32_t* tile, typename S::I w, int bit) {
  S::store_bits(tile, S::mask_or(S::left(w, 15 - bit), kPairSigns, kPairOnes));
}

// Elements between pairs of columns. A panel is two vectors of rows; a pair is two columns of
// floats or one column of pairs.
template <class S, class T>
constexpr int64_t pair_stride() {
  return (__is_same(T, float) ? 2 : 1) * 2 * S::kLanes;
}

template <class S, class Entry, class T>
void halfword_tile(const TileSpec& spec, T* tile) {
  constexpr int64_t kStride = pair_stride<S, T>();
  for (int v0 = 0; v0 < 2; v0 += S::kVectors) {
    const RowBlocks<S> rows(spec.seed, spec.row + v0 * S::kLanes);
    T* out = tile + v0 * S::kLanes;
    for (int64_t unit = 0; unit < spec.units; ++unit, out += 4 * kStride) {
      typename S::I words[4][S::kVectors];
      rows.words(static_cast<uint32_t>(spec.unit + unit), words);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < S::kVectors; ++v) {
          store_pair<S, Entry>(out + i * kStride + v * S::kLanes, words[i][v]);
        }
      }
    }
  }
}

template <class S, class T>
void rademacher_tile(const TileSpec& spec, T* tile) {
  constexpr int64_t kStride = pair_stride<S, T>();
  constexpr int64_t kUnits = facts(Distribution::kRademacher).block / kUnitColumns;
  for (int v0 = 0; v0 < 2; v0 += S::kVectors) {
    const RowBlocks<S> rows(spec.seed, spec.row + v0 * S::kLanes);
    T* out = tile + v0 * S::kLanes;
    typename S::I words[4][S::kVectors];
    for (int64_t unit = spec.unit; unit < spec.unit + spec.units; ++unit, out += 4 * kStride) {
      if (unit == spec.unit || unit % kUnits == 0) {
        rows.words(static_cast<uint32_t>(unit / kUnits), words);
      }
      const int word = static_cast<int>(unit % kUnits / 4), bit = static_cast<int>(unit % 4 * 4);
      for (int i = 0; i < 4; ++i) {
        for (int v = 0; v < S::kVectors; ++v) {
          store_signs<S>(out + i * kStride + v * S::kLanes, words[word][v], bit + i);
        }
      }
    }
  }
}

template <class S, class T>
void make_tile(const TileSpec& spec, T* tile) {
  switch (spec.distribution) {
    case Distribution::kNormal:
      return halfword_tile<S, Normal<S>>(spec, tile);
    case Distribution::kUniform:
      return halfword_tile<S, UniformLattice<S>>(spec, tile);
    case Distribution::kRademacher:
      return rademacher_tile<S>(spec, tile);
    case Distribution::kHadamard:
      break;  // its projection makes no tiles
  }
}

}  // namespace
}  // namespace dfa
