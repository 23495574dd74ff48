// Tiles of U for the projection, stored or multiplied as they are made. Lanes are rows: a vector
// holds a column.
#pragma once

#include "multiply.h"
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

// The entries of columns 2i and 2i + 1 for a vector of rows: as two vectors of floats, as one of
// bf16 pairs, or added to a sum times the error e.
template <class S, class Entry>
struct HalfwordPair {
  using F = typename S::F;
  typename S::I word;
  F even() const { return Entry::as_floats(Entry::even(word)); }
  F odd() const { return Entry::as_floats(Entry::odd(word)); }
  F add_even(F e, F sum) const { return S::fma(e, even(), sum); }
  F add_odd(F e, F sum) const { return S::fma(e, odd(), sum); }
  typename S::I both() const { return S::upper_halves(Entry::odd(word), Entry::even(word)); }
};

template <class S>
struct SignPair {
  using F = typename S::F;
  typename S::I word;
  int bit;  // of column 2i; that of column 2i + 1 is 16 higher
  F even() const { return S::flip(S::set1(1.0f), word, 31 - bit); }
  F odd() const { return S::flip(S::set1(1.0f), word, 15 - bit); }
  F add_even(F e, F sum) const { return S::plus(sum, S::flip(e, word, 31 - bit)); }
  F add_odd(F e, F sum) const { return S::plus(sum, S::flip(e, word, 15 - bit)); }
  typename S::I both() const { return S::mask_or(S::left(word, 15 - bit), kPairSigns, kPairOnes); }
};

// The units of a tile for S::kVectors vectors of rows, in order: begin(unit), counted from the
// tile's first, then pair(i, v) for columns 2i and 2i + 1 of it, i in 0..3.
template <class S, class Entry>
class HalfwordUnits {
 public:
  HalfwordUnits(const TileSpec& spec, uint64_t row) : rows_(spec.seed, row), first_(spec.unit) {}
  void begin(int64_t unit) { rows_.words(static_cast<uint32_t>(first_ + unit), words_); }
  HalfwordPair<S, Entry> pair(int i, int v) const { return {words_[i][v]}; }

 private:
  const RowBlocks<S> rows_;
  const int64_t first_;
  typename S::I words_[4][S::kVectors];
};

template <class S>
class SignUnits {
 public:
  SignUnits(const TileSpec& spec, uint64_t row) : rows_(spec.seed, row), first_(spec.unit) {}
  void begin(int64_t unit) {
    constexpr int64_t kUnits = facts(Distribution::kRademacher).block / kUnitColumns;
    const int64_t place = (first_ + unit) % kUnits;
    if (unit == 0 || place == 0) {
      rows_.words(static_cast<uint32_t>((first_ + unit) / kUnits), words_);
    }
    const int passed = static_cast<int>(place % 4 * 4);  // so that shifts of pairs are constants
    for (int v = 0; v < S::kVectors; ++v) word_[v] = S::right(words_[place / 4][v], passed);
  }
  SignPair<S> pair(int i, int v) const { return {word_[v], i}; }

 private:
  const RowBlocks<S> rows_;
  const int64_t first_;
  typename S::I words_[4][S::kVectors], word_[S::kVectors];
};

// Calls use(units) with what makes the units of a distribution, for `row` on.
template <class S, class Use>
void for_units(const TileSpec& spec, uint64_t row, const Use& use) {
  switch (spec.distribution) {
    case Distribution::kNormal:
      return use(HalfwordUnits<S, Normal<S>>(spec, row));
    case Distribution::kUniform:
      return use(HalfwordUnits<S, UniformLattice<S>>(spec, row));
    case Distribution::kRademacher:
      return use(SignUnits<S>(spec, row));
    case Distribution::kHadamard:
      break;  // its projection makes no tiles
  }
}

// A panel is two vectors of rows; a pair is two columns of floats or one column of pairs.
template <class S, class T>
void make_tile(const TileSpec& spec, T* tile) {
  constexpr int64_t kPanel = 2 * S::kLanes;
  for (int v0 = 0; v0 < 2; v0 += S::kVectors) {
    for_units<S>(spec, spec.row + static_cast<uint64_t>(v0 * S::kLanes), [&](auto units) {
      T* out = tile + v0 * S::kLanes;
      for (int64_t unit = 0; unit < spec.units; ++unit) {
        units.begin(unit);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
          for (int v = 0; v < S::kVectors; ++v) {
            const auto pair = units.pair(i, v);
            if constexpr (__is_same(T, float)) {
              S::store(out + v * S::kLanes, pair.even());
              S::store(out + v * S::kLanes + kPanel, pair.odd());
            } else {
              S::store_bits(out + v * S::kLanes, pair.both());
            }
          }
          out += (__is_same(T, float) ? 2 : 1) * kPanel;
        }
      }
    });
  }
}

// Makes a tile of floats from its bf16 pairs.
template <class S>
void unpack_tile(const uint32_t* pairs, int64_t units, float* tile) {
  constexpr int kPanel = 2 * S::kLanes;
  const uint32_t* const end = pairs + units * (kUnitColumns / 2) * kPanel;
  for (; pairs < end; pairs += kPanel, tile += 2 * kPanel) {
    for (int r = 0; r < kPanel; r += S::kLanes) {
      const auto pair = S::load_bits(pairs + r);
      S::store(tile + r, low_of_pairs<S>(pair));
      S::store(tile + kPanel + r, high_of_pairs<S>(pair));
    }
  }
}

// Multiplies a panel as it is made. Sums are those of multiply() for the tile: what is outside the
// depth meets an error of 0.
template <class S, class Ops, int Batch>
void fused_batch(const TileSpec& tile, const MultiplySpec& spec) {
  using Error = typename Ops::Error;
  constexpr int kUnit = kUnitColumns / Ops::kColumns;  // elements of a unit
  const auto* error = static_cast<const Error*>(spec.error);
  const int64_t end = spec.begin + spec.depth;
  for (int v0 = 0; v0 < 2; v0 += S::kVectors) {
    for_units<S>(tile, tile.row + static_cast<uint64_t>(v0 * S::kLanes), [&](auto units) {
      typename Ops::V acc[Batch][S::kVectors];
      for (auto& sums : acc) {
        for (auto& sum : sums) sum = Ops::zero();
      }
      for (int64_t unit = 0; unit < tile.units; ++unit) {
        const int64_t first = unit * kUnit;
        const int64_t skipped = first - spec.begin;
        const Error* errors = error + (skipped > 0 ? skipped : 0) * Batch;
        Error clipped[kUnit * Batch];
        if (skipped < 0 || first + kUnit > end) {
          for (int64_t k = 0; k < kUnit; ++k) {
            const bool inside = skipped + k >= 0 && first + k < end;
            for (int m = 0; m < Batch; ++m) {
              clipped[k * Batch + m] = inside ? error[(skipped + k) * Batch + m] : Error{};
            }
          }
          errors = clipped;
        }
        units.begin(unit);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
          for (int v = 0; v < S::kVectors; ++v) {
            const auto pair = units.pair(i, v);
#pragma GCC unroll 2
            for (int m = 0; m < Batch; ++m) {
              const Error* e = errors + i * kUnit / 4 * Batch + m;
              if constexpr (Ops::kColumns == 1) {
                acc[m][v] = pair.add_even(Ops::error(e[0]), acc[m][v]);
                acc[m][v] = pair.add_odd(Ops::error(e[Batch]), acc[m][v]);
              } else {
                acc[m][v] = Ops::fma(Ops::error(e[0]), Ops::entries(pair.both()), acc[m][v]);
              }
            }
          }
        }
      }
      finish<S, Ops>(acc, spec, v0 * S::kLanes);
    });
  }
}

template <class S, class Ops>
void fused(const TileSpec& tile, const MultiplySpec& spec) {
  for_few<kFusedBatch>(spec.batch, [&](auto batch) { fused_batch<S, Ops, batch>(tile, spec); });
}

}  // namespace
}  // namespace dfa
