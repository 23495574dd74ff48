// Lanes in AVX2 + FMA: 8 x 32 bits.
#pragma once

namespace dfa {
namespace {

// Quantile = p * G(r), p = 511/512 (2k - 4095)/4096, r = 1 - p * p, where G is a quartic in r for
// each octave of r, so no logarithm is computed. Row i holds the coefficients of r^i. The factor
// 511/512 keeps r above 2^-8, so that the low three bits of r's exponent tell the octaves apart; p
// and its constants are exact. The values stay away from every rounding tie by at least 0.17 % of
// the distance between two, and are proven on all 4096 inputs.
alignas(32) constexpr float kPieces[5][8] = {
    {0x1.065f62p3f, 0x1.223fb6p2f, 0x1.7b53c2p1f, 0x1.6a1606p1f, 0x1.462e18p1f, 0x1.2b3088p1f,
     0x1.0bca28p1f, 0x1.7de4e6p2f},
    {-0x1.9cfbe6p10f, -0x1.0a62bcp8f, -0x1.2f72cap4f, -0x1.bc918ap3f, -0x1.9d3596p2f,
     -0x1.e140c6p1f, -0x1.eadec2p0f, 0},
    {0x1.8841f2p17f, 0x1.e559fcp13f, 0x1.32b188p7f, 0x1.630ba4p6f, 0x1.2f21dep4f, 0x1.cd17cep2f,
     0x1.ec52e2p0f, -0x1.46ba3p18f},
    {-0x1.51b2dap23f, -0x1.aa2f38p18f, -0x1.98cf06p9f, -0x1.15690ep8f, -0x1.93b068p4f,
     -0x1.fae5bep2f, -0x1.1bd00cp0f, 0x1.f0e0a4p25f},
    {0x1.b22e56p27f, 0x1.1cb88ap22f, 0x1.185b86p12f, 0x1.a794e8p7f, 0x1.cf9e7cp1f, 0x1.c9fffp1f,
     0x1.10deap-2f, -0x1.b13c9cp31f},
};
constexpr float kShrink = 511.0f / 512;

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 2;
  static constexpr int kBatchF32 = 6;
  static constexpr int kBatchF64 = 2;
  static constexpr int kRadix = 8;  // vectors of a transform that are in registers together

  using W = __m256i;
  using I = __m256i;
  using F = __m256;
  using D = __m256d;

  static W set(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static W load(const uint64_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static W add(W a, W b) { return _mm256_add_epi64(a, b); }
  static W mul(W a, W b) { return _mm256_mul_epu32(a, b); }
  static W high(W a) { return _mm256_srli_epi64(a, 32); }
  static W xor2(W a, W b) { return _mm256_xor_si256(a, b); }
  static W xor3(W a, W b, W c) { return xor2(xor2(a, b), c); }
  static I merge(W even, W odd) {
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }

  static I bits(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static I load_bits(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store_bits(uint32_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }
  static I load_halfwords(const uint32_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <int N>
  static I right(I a) {
    return _mm256_srli_epi32(a, N);
  }
  template <int N>
  static I left(I a) {
    return _mm256_slli_epi32(a, N);
  }
  static I left(I a, int n) { return _mm256_slli_epi32(a, n); }
  static I right(I a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
  static I left_each(I a, I n) { return _mm256_sllv_epi32(a, n); }
  static I mask_or(I a, uint32_t mask, uint32_t ones) {
    return _mm256_or_si256(_mm256_and_si256(a, bits(mask)), bits(ones));
  }
  static I mask(I a, uint32_t m) { return _mm256_and_si256(a, bits(m)); }
  static F as_float(I a) { return _mm256_castsi256_ps(a); }
  static I as_bits(F a) { return _mm256_castps_si256(a); }
  static I plus(I a, I b) { return _mm256_add_epi32(a, b); }
  static I upper_halves(I high, I low) {  // the upper half of `low` below that of `high`
    return _mm256_blend_epi16(right<16>(low), high, 0xAA);
  }
  static void store_past_caches(void* p, const void* line) {
    const auto* from = static_cast<const __m256i*>(line);
    auto* to = static_cast<__m256i*>(p);
    for (int i = 0; i < 2; ++i) _mm256_stream_si256(to + i, _mm256_load_si256(from + i));
  }
  static void stream(float* p, F a) { _mm256_stream_ps(p, a); }
  static void stream(double* p, D a) { _mm256_stream_pd(p, a); }
  static void fence() { _mm_sfence(); }
  static void store_bf16(void* p, F a) {  // finite values
    const I x = _mm256_castps_si256(a);
    const I odd = mask(right<16>(x), 1);
    const I rounded = right<16>(_mm256_add_epi32(_mm256_add_epi32(x, bits(0x7fff)), odd));
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  // The quantile for 1 + k / 4096, before rounding.
  static F quantile(F one_plus) {
    const F p = fma(one_plus, set1(2 * kShrink), set1((0x1p-12f - 3.0f) * kShrink));
    const F r = _mm256_fnmadd_ps(p, p, set1(1.0f));
    const I piece = right<23>(_mm256_castps_si256(r));
    F g = coefficient(4, piece);
    g = fma(g, r, coefficient(3, piece));
    g = fma(g, r, coefficient(2, piece));
    g = fma(g, r, coefficient(1, piece));
    g = fma(g, r, coefficient(0, piece));
    return _mm256_mul_ps(g, p);
  }
  static F coefficient(int power, I piece) {
    return _mm256_permutevar8x32_ps(_mm256_load_ps(kPieces[power]), piece);
  }
  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F times(F a, F b) { return _mm256_mul_ps(a, b); }
  static D times(D a, D b) { return _mm256_mul_pd(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  static F plus(F a, F b) { return _mm256_add_ps(a, b); }
  static D plus(D a, D b) { return _mm256_add_pd(a, b); }

  static D zero_d() { return _mm256_setzero_pd(); }
  static D set1(double x) { return _mm256_set1_pd(x); }
  static D load(const double* p) { return _mm256_loadu_pd(p); }
  static D load_widen(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static void store(double* p, D a) { _mm256_storeu_pd(p, a); }
  static D fma(D a, D b, D c) { return _mm256_fmadd_pd(a, b, c); }

  static W widen_bits(const uint32_t* p) {
    return _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // Changes the sign where the word has the bit that a shift to the left by n makes the highest.
  static F flip(F a, I words, int n) {
    return _mm256_xor_ps(a, as_float(mask(_mm256_slli_epi32(words, n), 0x80000000u)));
  }
  static D flip(D a, W words, int n) {
    const W sign = _mm256_and_si256(_mm256_slli_epi64(words, n), set(uint64_t{1} << 63));
    return _mm256_xor_pd(a, _mm256_castsi256_pd(sign));
  }
  // 128 bits from each of p, p + stride, ..
  static F pieces(const float* p, int64_t stride) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride),
                                1);
  }
  static D pieces(const double* p, int64_t stride) {
    return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p)), _mm_loadu_pd(p + stride),
                                1);
  }
  // Turns the square of 4 x 4, or 2 x 2, numbers in each 128 bits.
  static void turn(F (&v)[4]) {
    const F a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
    const F c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
    v[0] = _mm256_shuffle_ps(a, c, 0x44);
    v[1] = _mm256_shuffle_ps(a, c, 0xee);
    v[2] = _mm256_shuffle_ps(b, d, 0x44);
    v[3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  static void turn(D (&v)[2]) {
    const D a = v[0];
    v[0] = _mm256_unpacklo_pd(a, v[1]);
    v[1] = _mm256_unpackhi_pd(a, v[1]);
  }

  static void store_blocks(uint32_t* p, I w0, I w1, I w2, I w3) {
    const I a = _mm256_unpacklo_epi32(w0, w1), b = _mm256_unpackhi_epi32(w0, w1);
    const I c = _mm256_unpacklo_epi32(w2, w3), d = _mm256_unpackhi_epi32(w2, w3);
    store_bits(p, _mm256_unpacklo_epi64(a, c));
    store_bits(p + 8, _mm256_unpackhi_epi64(a, c));
    store_bits(p + 16, _mm256_unpacklo_epi64(b, d));
    store_bits(p + 24, _mm256_unpackhi_epi64(b, d));
  }
};

}  // namespace
}  // namespace dfa
