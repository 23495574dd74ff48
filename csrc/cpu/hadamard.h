// The Walsh-Hadamard transforms of structured feedback, a block of 1024 numbers at a time.
//
// Such a block is a square [32][32]: number k = 32 * r + c, r its row. Stages h = 1 .. 16 of a
// transform combine numbers of one row, stages 32 .. 512 those of one column. Stages across rows of
// vectors need no shuffles. So a transform reads its input turned, [c][r], does the first five
// stages there, turns the square, and does the other five: its output is in natural order.
//
// A diagonal is 32 words of sign bits, word r for row r: turned vectors find their signs side by
// side, and one shift moves them in place.
#pragma once

#include "fill.h"

namespace dfa {
namespace {

constexpr int kSide = 32;
constexpr int kSquare = kSide * kSide;
static_assert(kSquare == kHadamardBlock);

// The bit of a word of a diagonal that is the sign of column c.
constexpr int sign_bit(int c) { return c / 2 + 16 * (c % 2); }

template <class S, class Real>
struct VectorOf {
  using V = typename S::F;
};
template <class S>
struct VectorOf<S, double> {
  using V = typename S::D;
};

// Vectors of kLanes numbers of type Real.
template <class S, class Real>
struct Vectors {
  static constexpr int kLanes = S::kLanes * 4 / static_cast<int>(sizeof(Real));
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(Real));  // numbers in 128 bits
  static constexpr bool kDouble = sizeof(Real) == 8;
  using V = typename VectorOf<S, Real>::V;

  static V load(const Real* p) { return S::load(p); }
  static void store(Real* p, V a) { S::store(p, a); }

  // The sign words of kLanes rows, each in the place of a number.
  static auto words(const uint32_t* p) {
    if constexpr (kDouble)
      return S::widen_bits(p);
    else
      return S::load_bits(p);
  }
  // The sign of each number changes where its word has the bit `n`.
  template <class Words>
  static V flip(V a, Words words, int n) {
    if constexpr (kDouble)
      return S::flip(a, words, 63 - n);
    else
      return S::flip(a, words, 31 - n);
  }

  // A square of kLanes x kLanes numbers with rows kSide apart, turned: out[j] holds column j.
  static void load_turned(const Real* p, V* out) {
    for (int j = 0; j < kLanes; j += kPiece) {
      V rows[kPiece];
      for (int s = 0; s < kPiece; ++s) rows[s] = S::pieces(p + s * kSide + j, kPiece * kSide);
      S::turn(rows);
      for (int s = 0; s < kPiece; ++s) out[j + s] = rows[s];
    }
  }
};

// The stages h = 1, 2, .. N / 2 across N vectors.
template <int N, class V>
__attribute__((always_inline)) inline void butterflies(V* v) {
#pragma GCC unroll 5
  for (int h = 1; h < N; h *= 2) {
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) {
      if (i & h) continue;
      const V a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
}

// The stages that kRadix rows at a time leave to do, across all rows of a square, in place.
template <class T, int kRadix, class Real>
__attribute__((always_inline)) inline void across_groups(Real* square) {
  constexpr int kGroups = kSide / kRadix;
  if constexpr (kGroups > 1) {
    for (int i = 0; i < kRadix; ++i) {
      for (int x = 0; x < kSide; x += T::kLanes) {
        typename T::V v[kGroups];
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) v[g] = T::load(square + (i + g * kRadix) * kSide + x);
        butterflies<kGroups>(v);
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) T::store(square + (i + g * kRadix) * kSide + x, v[g]);
      }
    }
  }
}

// natural = fwht(D_0 * in_0 + D_1 * in_1 + ..): `blocks` turned squares and their diagonals.
template <class S, class Real>
void transform(const void* in, const uint32_t* signs, int64_t blocks, void* natural) {
  using T = Vectors<S, Real>;
  using V = typename T::V;
  constexpr int kRadix = S::kRadix, kLanes = T::kLanes;
  const Real* const squares = static_cast<const Real*>(in);
  Real* const out = static_cast<Real*>(natural);
  alignas(64) Real turned[kSquare];
  for (int r = 0; r < kSide; r += kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kSide; c += kRadix) {
      V v[kRadix];
      const Real* from = squares + c * kSide + r;
      const auto first = T::words(signs + r);
#pragma GCC unroll 32
      for (int i = 0; i < kRadix; ++i) {
        v[i] = T::flip(T::load(from + i * kSide), first, sign_bit(c + i));
      }
      for (int64_t b = 1; b < blocks; ++b) {
        from += kSquare;
        const auto words = T::words(signs + b * kSide + r);
#pragma GCC unroll 32
        for (int i = 0; i < kRadix; ++i) {
          v[i] = v[i] + T::flip(T::load(from + i * kSide), words, sign_bit(c + i));
        }
      }
      butterflies<kRadix>(v);
#pragma GCC unroll 32
      for (int i = 0; i < kRadix; ++i) T::store(turned + (c + i) * kSide + r, v[i]);
    }
  }
  across_groups<T, kRadix>(turned);
  for (int c = 0; c < kSide; c += kLanes) {
    for (int r = 0; r < kSide; r += kRadix) {
      V v[kRadix];
#pragma GCC unroll 16
      for (int g = 0; g < kRadix; g += kLanes) T::load_turned(turned + c * kSide + r + g, v + g);
      butterflies<kRadix>(v);
#pragma GCC unroll 32
      for (int i = 0; i < kRadix; ++i) T::store(out + (r + i) * kSide + c, v[i]);
    }
  }
  across_groups<T, kRadix>(out);
}

// Turns a square.
template <class S, class Real>
void turn(const void* in, void* out) {
  using T = Vectors<S, Real>;
  for (int r = 0; r < kSide; r += T::kLanes) {
    for (int c = 0; c < kSide; c += T::kLanes) {
      typename T::V v[T::kLanes];
      T::load_turned(static_cast<const Real*>(in) + r * kSide + c, v);
      for (int i = 0; i < T::kLanes; ++i) {
        T::store(static_cast<Real*>(out) + (c + i) * kSide + r, v[i]);
      }
    }
  }
}

// sums_b += D_b * in for each of `blocks` turned squares.
template <class S, class Real>
void accumulate(const void* in, const uint32_t* signs, int64_t blocks, void* sums) {
  using T = Vectors<S, Real>;
  for (int64_t b = 0; b < blocks; ++b) {
    Real* sum = static_cast<Real*>(sums) + b * kSquare;
    for (int r = 0; r < kSide; r += T::kLanes) {
      const auto words = T::words(signs + b * kSide + r);
#pragma GCC unroll 32
      for (int c = 0; c < kSide; ++c) {
        const int place = c * kSide + r;
        const auto term =
            T::flip(T::load(static_cast<const Real*>(in) + place), words, sign_bit(c));
        T::store(sum + place, T::load(sum + place) + term);
      }
    }
  }
}

// The diagonals of input blocks [spec.block, spec.block + spec.blocks): kSide words each.
template <class S>
void make_signs(const SignSpec& spec, uint32_t* words) {
  constexpr int64_t kGroups = kHadamardBlock / 128;  // Philox blocks of a diagonal
  BlockLanes<S> lanes(spec.seed, spec.domain);
  const int64_t end = kGroups * spec.blocks;
  for (int64_t group = 0; group < end; group += S::kLanes, words += 4 * S::kLanes) {
    lanes.set_run(spec.output, static_cast<uint32_t>(kGroups * spec.block + group));
    if (group + S::kLanes <= end) {
      lanes.words(words);
    } else {
      uint32_t more[4 * S::kLanes];
      lanes.words(more);
      __builtin_memcpy(words, more, static_cast<size_t>(end - group) * 4 * sizeof(uint32_t));
    }
  }
}

}  // namespace
}  // namespace dfa
