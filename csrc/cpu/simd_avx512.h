// Lanes in AVX-512 (F, BW, DQ, VL): 16 x 32 bits.
#pragma once

namespace dfa {
namespace {

// Quantile = p * G(r), p = 511/512 (2k - 4095)/4096, r = 1 - p * p, where G is a square in r for
// each quarter octave of r, so no logarithm is computed. Row i holds the coefficients of r^i. The
// factor 511/512 keeps r above 2^-8, so that the low five bits of (bits of r >> 21) tell the pieces
// apart; p and its constants are exact. The values stay away from every rounding tie by at least
// 0.4 % of the distance between two, and are proven on all 4096 inputs.
alignas(64) constexpr float kPieces[3][32] = {
    {0x1.a93a22p1f, 0x1.995c08p1f, 0x1.959b24p1f, 0x1.83ad2cp1f, 0x1.1ef39p2f,  0x1.3ea8d6p2f,
     0x1.7afeecp1f, 0x1.7afc24p1f, 0x1.6b79d6p1f, 0x1.5fc0b6p1f, 0x1.55ed8cp1f, 0x1.84c9bcp0f,
     0x1.6f4912p1f, 0x1.76f33ap1f, 0x1.b51738p1f, 0x1.79a9e6p1f, 0x1.4610bep1f, 0x1.16cdap1f,
     0x1.284f3ap1f, 0x1.46e018p1f, 0x1.204aap1f,  0x1.15ee1p1f,  0x1.0324acp1f, 0x1.040402p1f,
     0x1.ffb9eep0f, 0x1.e8e3dp0f,  0x1.df870ep0f, 0x1.cd6f72p0f, 0x1.d708e6p1f, 0x1.b129a4p1f,
     0x1.9f513p1f,  0x1.9379eap1f},
    {0,
     0,
     0,
     0,
     -0x1.5bfe68p7f,
     -0x1.8f71eap7f,
     -0x1.d109a2p3f,
     -0x1.d0d652p3f,
     -0x1.528648p3f,
     -0x1.06d60cp3f,
     -0x1.a92b92p2f,
     0x1.e9ffdep4f,
     -0x1.bd831cp3f,
     -0x1.c444fcp3f,
     -0x1.704372p4f,
     -0x1.a0f9c4p3f,
     -0x1.7f27f4p2f,
     -0x1.71b33ep0f,
     -0x1.963c6cp1f,
     -0x1.50b86ep2f,
     -0x1.57983p1f,
     -0x1.11fa6cp1f,
     -0x1.68711ep0f,
     -0x1.730dcap0f,
     -0x1.53d658p0f,
     -0x1.0923e2p0f,
     -0x1.dc8bdcp-1f,
     -0x1.86c724p-1f,
     0,
     0,
     0,
     0},
    {-0x1.c29738p11f,
     -0x1.1343f2p11f,
     -0x1.d36802p10f,
     -0x1.0adfdcp10f,
     0x1.0697fap12f,
     0x1.088966p12f,
     -0x1.743746p3f,
     -0x1.77e984p3f,
     -0x1.15593p3f,
     -0x1.b9293ap2f,
     -0x1.6d3622p2f,
     -0x1.306fcep8f,
     0x1.f2c0e4p5f,
     0x1.bd44c8p5f,
     0x1.7ea3dap6f,
     0x1.56c266p5f,
     0x1.854de2p3f,
     -0x1.e4e2e6p0f,
     0x1.bc016ap1f,
     0x1.00eba8p3f,
     0x1.418506p1f,
     0x1.99678cp0f,
     0x1.5dc31p-1f,
     0x1.7c0e46p-1f,
     0x1.421d08p-1f,
     0x1.8f89dep-2f,
     0x1.4308a4p-2f,
     0x1.bb1a06p-3f,
     0,
     0,
     0,
     0},
};
constexpr float kShrink = 511.0f / 512;

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 2;
  static constexpr int kBatchF32 = 12;
  static constexpr int kBatchF64 = 6;
  static constexpr int kRadix = 32;  // vectors of a transform that are in registers together

  using W = __m512i;
  using I = __m512i;
  using F = __m512;
  using D = __m512d;

  static W set(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
  static W load(const uint64_t* p) { return _mm512_loadu_si512(p); }
  static W add(W a, W b) { return _mm512_add_epi64(a, b); }
  static W mul(W a, W b) { return _mm512_mul_epu32(a, b); }
  static W high(W a) { return _mm512_srli_epi64(a, 32); }
  static W xor2(W a, W b) { return _mm512_xor_si512(a, b); }
  static W xor3(W a, W b, W c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  static I merge(W even, W odd) {
    return _mm512_castps_si512(
        _mm512_mask_moveldup_ps(_mm512_castsi512_ps(even), 0xAAAA, _mm512_castsi512_ps(odd)));
  }

  static I bits(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static I load_bits(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store_bits(uint32_t* p, I a) { _mm512_storeu_si512(p, a); }
  static I load_halfwords(const uint32_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <int N>
  static I right(I a) {
    return _mm512_srli_epi32(a, N);
  }
  template <int N>
  static I left(I a) {
    return _mm512_slli_epi32(a, N);
  }
  static I left(I a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
  static I right(I a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
  static I left_each(I a, I n) { return _mm512_sllv_epi32(a, n); }
  static I mask_or(I a, uint32_t mask, uint32_t ones) {
    return _mm512_ternarylogic_epi32(a, bits(mask), bits(ones), 0xEA);  // (a & mask) | ones
  }
  static I mask(I a, uint32_t m) { return _mm512_and_si512(a, bits(m)); }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }
  static I as_bits(F a) { return _mm512_castps_si512(a); }
  static I plus(I a, I b) { return _mm512_add_epi32(a, b); }
  static I upper_halves(I high, I low) {  // the upper half of `low` below that of `high`
    return _mm512_ternarylogic_epi32(high, bits(0xffff0000u), right<16>(low), 0xEA);
  }
  static void store_past_caches(void* p, const void* line) {
    _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_load_si512(line));
  }
  static void stream(float* p, F a) { _mm512_stream_ps(p, a); }
  static void stream(double* p, D a) { _mm512_stream_pd(p, a); }
  static void fence() { _mm_sfence(); }
  static void store_bf16(void* p, F a) {  // finite values
    const I x = _mm512_castps_si512(a);
    const I odd = mask(right<16>(x), 1);
    const I rounded = right<16>(_mm512_add_epi32(_mm512_add_epi32(x, bits(0x7fff)), odd));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }

  // The quantile for 1 + k / 4096, before rounding.
  static F quantile(F one_plus) {
    const F p = fma(one_plus, set1(2 * kShrink), set1((0x1p-12f - 3.0f) * kShrink));
    const F r = _mm512_fnmadd_ps(p, p, set1(1.0f));
    const I piece = right<21>(_mm512_castps_si512(r));
    F g = coefficient(2, piece);
    g = fma(g, r, coefficient(1, piece));
    g = fma(g, r, coefficient(0, piece));
    return _mm512_mul_ps(g, p);
  }
  static F coefficient(int power, I piece) {
    return _mm512_permutex2var_ps(_mm512_load_ps(kPieces[power]), piece,
                                  _mm512_load_ps(kPieces[power] + 16));
  }
  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F times(F a, F b) { return _mm512_mul_ps(a, b); }
  static D times(D a, D b) { return _mm512_mul_pd(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  static F plus(F a, F b) { return _mm512_add_ps(a, b); }
  static D plus(D a, D b) { return _mm512_add_pd(a, b); }

  static D zero_d() { return _mm512_setzero_pd(); }
  static D set1(double x) { return _mm512_set1_pd(x); }
  static D load(const double* p) { return _mm512_loadu_pd(p); }
  static D load_widen(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static void store(double* p, D a) { _mm512_storeu_pd(p, a); }
  static D fma(D a, D b, D c) { return _mm512_fmadd_pd(a, b, c); }

  static W widen_bits(const uint32_t* p) {
    return _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // Changes the sign where the word has the bit that a shift to the left by n makes the highest.
  static F flip(F a, I words, int n) {
    const I moved = _mm512_slli_epi32(words, static_cast<unsigned>(n));
    return as_float(_mm512_ternarylogic_epi32(moved, as_bits(a), bits(0x80000000u), 0x6C));
  }
  static D flip(D a, W words, int n) {
    const W moved = _mm512_slli_epi64(words, static_cast<unsigned>(n));
    return _mm512_castsi512_pd(
        _mm512_ternarylogic_epi64(moved, _mm512_castpd_si512(a), set(uint64_t{1} << 63), 0x6C));
  }
  // 128 bits from each of p, p + stride, ..
  static F pieces(const float* p, int64_t stride) {
    F a = _mm512_castps128_ps512(_mm_loadu_ps(p));
    a = _mm512_insertf32x4(a, _mm_loadu_ps(p + stride), 1);
    a = _mm512_insertf32x4(a, _mm_loadu_ps(p + 2 * stride), 2);
    return _mm512_insertf32x4(a, _mm_loadu_ps(p + 3 * stride), 3);
  }
  static D pieces(const double* p, int64_t stride) {
    D a = _mm512_castpd128_pd512(_mm_loadu_pd(p));
    a = _mm512_insertf64x2(a, _mm_loadu_pd(p + stride), 1);
    a = _mm512_insertf64x2(a, _mm_loadu_pd(p + 2 * stride), 2);
    return _mm512_insertf64x2(a, _mm_loadu_pd(p + 3 * stride), 3);
  }
  // Turns the square of 4 x 4, or 2 x 2, numbers in each 128 bits.
  static void turn(F (&v)[4]) {
    const F a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
    const F c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
    v[0] = _mm512_shuffle_ps(a, c, 0x44);
    v[1] = _mm512_shuffle_ps(a, c, 0xee);
    v[2] = _mm512_shuffle_ps(b, d, 0x44);
    v[3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  static void turn(D (&v)[2]) {
    const D a = v[0];
    v[0] = _mm512_unpacklo_pd(a, v[1]);
    v[1] = _mm512_unpackhi_pd(a, v[1]);
  }

  static void store_blocks(uint32_t* p, I w0, I w1, I w2, I w3) {
    const I a = _mm512_unpacklo_epi32(w0, w1), b = _mm512_unpackhi_epi32(w0, w1);
    const I c = _mm512_unpacklo_epi32(w2, w3), d = _mm512_unpackhi_epi32(w2, w3);
    store_bits(p, _mm512_unpacklo_epi64(a, c));
    store_bits(p + 16, _mm512_unpackhi_epi64(a, c));
    store_bits(p + 32, _mm512_unpacklo_epi64(b, d));
    store_bits(p + 48, _mm512_unpackhi_epi64(b, d));
  }
};

}  // namespace
}  // namespace dfa
