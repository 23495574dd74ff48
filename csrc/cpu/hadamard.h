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

// The stages that kRadix rows at a time leave to do, across all rows of a square. Each vector goes
// to put(its place, itself), two neighbours in turn: together they fill a cache line.
template <class T, int kRadix, class Real, class Put>
__attribute__((always_inline)) inline void across_groups(const Real* square, const Put& put) {
  constexpr int kGroups = kSide / kRadix;
  for (int i = 0; i < kRadix; ++i) {
#pragma GCC unroll 4
    for (int x = 0; x < kSide; x += 2 * T::kLanes) {
      typename T::V v[2][kGroups];
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side) {
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) {
          v[side][g] = T::load(square + (i + g * kRadix) * kSide + x + side * T::kLanes);
        }
        butterflies<kGroups>(v[side]);
      }
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 2
        for (int side = 0; side < 2; ++side) {
          put((i + g * kRadix) * kSide + x + side * T::kLanes, v[side][g]);
        }
      }
    }
  }
}

// fwht(D_0 * in_0 + D_1 * in_1 + ..): `blocks` squares and their diagonals. They are turned, or one
// square in natural order. The result goes to put(place in natural order, vector).
template <class S, class Real, bool kTurned, class Put>
__attribute__((always_inline)) inline void transform_to(const void* in, const uint32_t* signs,
                                                        int64_t blocks, const Put& put) {
  using T = Vectors<S, Real>;
  using V = typename T::V;
  constexpr int kRadix = S::kRadix, kLanes = T::kLanes;
  const Real* const squares = static_cast<const Real*>(in);
  alignas(64) Real turned[kSquare], natural[kSquare];
  for (int r = 0; r < kSide; r += kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kSide; c += kRadix) {
      V v[kRadix];
      if constexpr (kTurned) {
#pragma GCC unroll 32
        for (int i = 0; i < kRadix; ++i) v[i] = T::load(squares + (c + i) * kSide + r);
      } else {
#pragma GCC unroll 16
        for (int g = 0; g < kRadix; g += kLanes) {
          T::load_turned(squares + r * kSide + c + g, v + g);
        }
      }
      const auto first = T::words(signs + r);
#pragma GCC unroll 32
      for (int i = 0; i < kRadix; ++i) v[i] = T::flip(v[i], first, sign_bit(c + i));
      for (int64_t b = 1; kTurned && b < blocks; ++b) {
        const Real* from = squares + b * kSquare + c * kSide + r;
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
  if constexpr (kRadix < kSide) {
    across_groups<T, kRadix>(turned, [&](int place, V v) { T::store(turned + place, v); });
  }
  for (int c = 0; c < kSide; c += kLanes) {
    for (int r = 0; r < kSide; r += kRadix) {
      V v[kRadix];
#pragma GCC unroll 16
      for (int g = 0; g < kRadix; g += kLanes) T::load_turned(turned + c * kSide + r + g, v + g);
      butterflies<kRadix>(v);
#pragma GCC unroll 32
      for (int i = 0; i < kRadix; ++i) {
        const int place = (r + i) * kSide + c;
        if constexpr (kRadix < kSide) {
          T::store(natural + place, v[i]);
        } else {
          put(place, v[i]);
        }
      }
    }
  }
  if constexpr (kRadix < kSide) across_groups<T, kRadix>(natural, put);
}

template <class S, class Real, bool kTurned>
void transform(const void* in, const uint32_t* signs, int64_t blocks, void* natural) {
  using T = Vectors<S, Real>;
  transform_to<S, Real, kTurned>(in, signs, blocks, [&](int place, typename T::V v) {
    T::store(static_cast<Real*>(natural) + place, v);
  });
}

// The same of turned squares, times `factor`, to memory where a layer's signal is.
template <class S, class Real>
void transform_signal(const void* in, const uint32_t* signs, int64_t blocks, double factor,
                      bool past_caches, void* signal) {
  using T = Vectors<S, Real>;
  using V = typename T::V;
  Real* const out = static_cast<Real*>(signal);
  const V f = S::set1(static_cast<Real>(factor));
  if (past_caches && reinterpret_cast<uintptr_t>(out) % sizeof(V) == 0) {
    transform_to<S, Real, true>(in, signs, blocks,
                                [&](int place, V v) { S::stream(out + place, v * f); });
    S::fence();
  } else {
    transform_to<S, Real, true>(in, signs, blocks,
                                [&](int place, V v) { T::store(out + place, v * f); });
  }
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
  BlockLanes<S, 1> lanes(spec.seed, spec.domain);
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
