// Lanes in the vector extensions of GCC and Clang, for every architecture. The compiler uses what
// the baseline has (SSE2, NEON).
#pragma once

namespace dfa {
namespace {

// The 4096 quantiles as floats. Without wide vectors, a load is cheaper than the formula.
struct CodebookTable {
  float value[kCodebookSize];
  CodebookTable() {
    for (uint32_t k = 0; k < kCodebookSize; ++k) value[k] = bfloat16_value(codebook(k));
  }
};
const CodebookTable kCodebookTable;

struct Portable {
  static constexpr int kLanes = 4;
  static constexpr int kVectors = 1;  // vectors of rows whose blocks are made together
  static constexpr int kBatchF32 = 6;
  static constexpr int kBatchF64 = 3;
  static constexpr int kRadix = 8;  // vectors of a transform that are in registers together

  typedef uint64_t W __attribute__((vector_size(16)));
  typedef uint32_t I __attribute__((vector_size(16)));
  typedef float F __attribute__((vector_size(16)));
  typedef double D __attribute__((vector_size(16)));
  typedef float HalfF __attribute__((vector_size(8)));

  template <class V>
  static V load_as(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  static W set(uint64_t x) { return W{} + x; }
  static W load(const uint64_t* p) { return load_as<W>(p); }
  static W add(W a, W b) { return a + b; }
  static W mul(W a, W b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
  static W high(W a) { return a >> 32; }
  static W xor2(W a, W b) { return a ^ b; }
  static W xor3(W a, W b, W c) { return a ^ b ^ c; }
  static I merge(W even, W odd) { return reinterpret_cast<I>((even & 0xffffffffu) | odd << 32); }

  static I bits(uint32_t x) { return I{} + x; }
  static I load_bits(const uint32_t* p) { return load_as<I>(p); }
  static void store_bits(uint32_t* p, I a) { std::memcpy(p, &a, sizeof a); }
  static I load_halfwords(const uint32_t* p) {
    I r;
    for (int i = 0; i < kLanes; ++i) r[i] = p[i / 2] >> (16 * (i % 2)) & 0xffffu;
    return r;
  }
  template <int N>
  static I right(I a) {
    return a >> N;
  }
  template <int N>
  static I left(I a) {
    return a << N;
  }
  static I left(I a, int n) { return a << n; }
  static I right(I a, int n) { return a >> n; }
  static I left_each(I a, I n) { return a << n; }
  static I mask_or(I a, uint32_t mask, uint32_t ones) { return (a & mask) | ones; }
  static I mask(I a, uint32_t m) { return a & m; }
  static F as_float(I a) { return reinterpret_cast<F>(a); }
  static I as_bits(F a) { return reinterpret_cast<I>(a); }
  static I plus(I a, I b) { return a + b; }
  static I upper_halves(I high, I low) {  // the upper half of `low` below that of `high`
    return low >> 16 | (high & 0xffff0000u);
  }
  static void store_past_caches(void* p, const void* line) { std::memcpy(p, line, 64); }
  static void stream(float* p, F a) { store(p, a); }
  static void stream(double* p, D a) { store(p, a); }
  static void fence() {}
  static void store_bf16(void* p, F a) {
    uint16_t halves[kLanes];
    for (int i = 0; i < kLanes; ++i) halves[i] = bfloat16_bits(a[i]);
    std::memcpy(p, halves, sizeof halves);
  }

  // The quantile for 1 + k / 4096, already rounded.
  static F quantile(F one_plus) {
    const I k = (as_bits(one_plus) >> 11) & 0xfffu;
    F r;
    for (int i = 0; i < kLanes; ++i) r[i] = kCodebookTable.value[k[i]];
    return r;
  }

  static F zero() { return F{}; }
  static F set1(float x) { return F{} + x; }
  static F load(const float* p) { return load_as<F>(p); }
  static void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static F times(F a, F b) { return a * b; }
  static D times(D a, D b) { return a * b; }
  static F plus(F a, F b) { return a + b; }
  static F fma(F a, F b, F c) { return a * b + c; }

  static D zero_d() { return D{}; }
  static D set1(double x) { return D{} + x; }
  static D load(const double* p) { return load_as<D>(p); }
  static D load_widen(const float* p) { return __builtin_convertvector(load_as<HalfF>(p), D); }
  static void store(double* p, D a) { std::memcpy(p, &a, sizeof a); }
  static D plus(D a, D b) { return a + b; }
  static D fma(D a, D b, D c) { return a * b + c; }

  static W widen_bits(const uint32_t* p) { return W{p[0], p[1]}; }
  // Changes the sign where the word has the bit that a shift to the left by n makes the highest.
  static F flip(F a, I words, int n) { return as_float(as_bits(a) ^ (words << n & 0x80000000u)); }
  static D flip(D a, W words, int n) {
    return reinterpret_cast<D>(reinterpret_cast<W>(a) ^ (words << n & uint64_t{1} << 63));
  }
  // 128 bits from each of p, p + stride, ..: here from p alone.
  static F pieces(const float* p, int64_t) { return load(p); }
  static D pieces(const double* p, int64_t) { return load(p); }
  // Turns the square of 4 x 4, or 2 x 2, numbers in each 128 bits.
  static void turn(F (&v)[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) {
        const float below = v[i][j];
        v[i][j] = v[j][i];
        v[j][i] = below;
      }
    }
  }
  static void turn(D (&v)[2]) {
    const double below = v[1][0];
    v[1][0] = v[0][1];
    v[0][1] = below;
  }

  // Transposes four vectors of words to kLanes blocks of four words. The block of lane l is number
  // (l % 4) * (kLanes / 4) + l / 4.
  static void store_blocks(uint32_t* p, I w0, I w1, I w2, I w3) {
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t* block = p + 4 * (lane % 4 * (kLanes / 4) + lane / 4);
      block[0] = w0[lane];
      block[1] = w1[lane];
      block[2] = w2[lane];
      block[3] = w3[lane];
    }
  }
};

}  // namespace
}  // namespace dfa
