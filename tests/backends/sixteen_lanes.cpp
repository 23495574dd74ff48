// Runs the transforms of structured feedback, and products by rows, with lanes as wide as
// AVX-512's, made of the compiler's vectors, and compares them with the portable ones. Prints
// "equal".
#include <cstdio>

#include "kernels.h"
#include "simd_portable.h"
// Builds on both.
#include "hadamard.h"
#include "multiply.h"

namespace dfa {
namespace {

struct Sixteen {
  static constexpr int kLanes = 16;
  static constexpr int kBatchF32 = 12;
  static constexpr int kBatchF64 = 6;
  static constexpr int kRadix = 32;

  typedef uint64_t W __attribute__((vector_size(64)));
  typedef uint32_t I __attribute__((vector_size(64)));
  typedef float F __attribute__((vector_size(64)));
  typedef double D __attribute__((vector_size(64)));

  template <class V>
  static V load_as(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static F load(const float* p) { return load_as<F>(p); }
  static D load(const double* p) { return load_as<D>(p); }
  static I load_bits(const uint32_t* p) { return load_as<I>(p); }
  static W widen_bits(const uint32_t* p) {
    W w;
    for (int i = 0; i < 8; ++i) w[i] = p[i];
    return w;
  }
  static void store(float* p, F a) { __builtin_memcpy(p, &a, sizeof a); }
  static void store(double* p, D a) { __builtin_memcpy(p, &a, sizeof a); }
  static F set1(float x) { return F{} + x; }
  static D set1(double x) { return D{} + x; }
  static F zero() { return F{}; }
  static D zero_d() { return D{}; }
  static D load_widen(const float* p) {
    D d;
    for (int i = 0; i < 8; ++i) d[i] = p[i];
    return d;
  }
  static F fma(F a, F b, F c) { return a * b + c; }
  static D fma(D a, D b, D c) { return a * b + c; }
  static F plus(F a, F b) { return a + b; }
  static D plus(D a, D b) { return a + b; }
  static void stream(float* p, F a) { store(p, a); }
  static void stream(double* p, D a) { store(p, a); }
  static void fence() {}
  static F flip(F a, I words, int n) {
    return reinterpret_cast<F>(reinterpret_cast<I>(a) ^ (words << n & 0x80000000u));
  }
  static D flip(D a, W words, int n) {
    return reinterpret_cast<D>(reinterpret_cast<W>(a) ^ (words << n & uint64_t{1} << 63));
  }
  template <class V, class Real>
  static V pieces_of(const Real* p, int64_t stride) {
    constexpr int kPiece = 16 / sizeof(Real);
    V v;
    for (int i = 0; i < 4 * kPiece; ++i) v[i] = p[i / kPiece * stride + i % kPiece];
    return v;
  }
  static F pieces(const float* p, int64_t stride) { return pieces_of<F>(p, stride); }
  static D pieces(const double* p, int64_t stride) { return pieces_of<D>(p, stride); }
  template <class V, int N>
  static void turn_pieces(V (&v)[N]) {
    V out[N];
    for (int i = 0; i < N; ++i) {
      for (int lane = 0; lane < 4 * N; ++lane) out[i][lane] = v[lane % N][lane / N * N + i];
    }
    for (int i = 0; i < N; ++i) v[i] = out[i];
  }
  static void turn(F (&v)[4]) { turn_pieces(v); }
  static void turn(D (&v)[2]) { turn_pieces(v); }
};

template <class Real>
bool equal() {
  alignas(64) static Real in[3 * kSquare], ours[kSquare], theirs[kSquare];
  uint32_t signs[3 * kSide];
  uint64_t state = 1;
  const auto next = [&] { return state = state * 6364136223846793005u + 1442695040888963407u; };
  for (Real& x : in) x = static_cast<Real>(static_cast<int64_t>(next()) >> 20) / Real(1 << 30);
  for (uint32_t& word : signs) word = static_cast<uint32_t>(next() >> 32);
  const auto same = [&] { return __builtin_memcmp(ours, theirs, sizeof ours) == 0; };
  transform<Sixteen, Real, true>(in, signs, 3, ours);
  transform<Portable, Real, true>(in, signs, 3, theirs);
  bool all = same();
  transform<Sixteen, Real, false>(in, signs, 1, ours);
  transform<Portable, Real, false>(in, signs, 1, theirs);
  all = all && same();
  transform_signal<Sixteen, Real>(in, signs, 2, 0.3, true, ours);
  transform_signal<Portable, Real>(in, signs, 2, 0.3, false, theirs);
  all = all && same();
  turn<Sixteen, Real>(in, ours);
  turn<Portable, Real>(in, theirs);
  all = all && same();
  accumulate<Sixteen, Real>(in, signs, 1, ours);
  accumulate<Portable, Real>(in, signs, 1, theirs);
  return all && same();
}

// Sums of small integers are exact, in any order.
template <template <class> class Ops>
bool equal_dots() {
  using Real = typename Ops<Sixteen>::Error;
  constexpr int kStride = 200;
  static Real error[kDotBatch * kStride];
  static float tile[kStride];
  for (int i = 0; i < kDotBatch * kStride; ++i) error[i] = static_cast<Real>(i * 7 % 31 - 15);
  for (int i = 0; i < kStride; ++i) tile[i] = static_cast<float>(i * 5 % 17 - 8);
  for (int batch = 1; batch <= kDotBatch; ++batch) {
    for (int depth = 0; depth <= kStride; ++depth) {
      for (bool accumulate : {false, true}) {
        Real sums[2][2 * kDotBatch] = {{1, 2, 3, 4, 5, 6, 7, 8}, {1, 2, 3, 4, 5, 6, 7, 8}};
        MultiplySpec spec{error, tile, sums[0], depth, kStride, 2, batch, accumulate};
        dot<Sixteen, Ops<Sixteen>>(spec);
        spec.acc = sums[1];
        dot<Portable, Ops<Portable>>(spec);
        if (__builtin_memcmp(sums[0], sums[1], sizeof sums[0]) != 0) return false;
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace dfa

int main() {
  const bool transforms = dfa::equal<float>() && dfa::equal<double>();
  const bool dots = dfa::equal_dots<dfa::Float32Ops>() && dfa::equal_dots<dfa::Float64Ops>();
  std::puts(transforms && dots ? "equal" : "different");
}
