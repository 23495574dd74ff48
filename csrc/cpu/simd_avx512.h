// Lanes in AVX-512 (F, BW, DQ, VL): 16 x 32 bits.
#pragma once

namespace dfa {
namespace {

// Quantile = p * G(q), q = 1 - p * p, where G is a cubic in q for each half octave of q, so no
// logarithm is computed. Row i holds the coefficients of q^i. The low five bits of (bits of q >>
// 22) pick the column; the 24 values that occur are distinct. The fit to the formula in entries.h
// errs by at most 0.15 of the distance to a rounding tie, and is proven on all 4096 inputs.
alignas(64) constexpr float kHalfOctaves[4][32] = {
    {0,
     0,
     0,
     0,
     0,
     0,
     0,
     0x1.d5def6p-1f,
     0,
     0,
     0x1.b08a74p-1f,
     0,
     0x1.9e7d36p-1f,
     0x1.924474p-1f,
     0x1.347d7ep+1f,
     0x1.242d04p+1f,
     0x1.b08312p+1f,
     0x1.a49cecp+1f,
     0x1.989e42p+1f,
     0x1.8b7f02p+1f,
     0x1.7e5792p+1f,
     0x1.7041d2p+1f,
     0x1.61f08ep+1f,
     0x1.5472e8p+1f,
     0x1.46becp+1f,
     0x1.36787cp+1f,
     0x1.272d04p+1f,
     0x1.17f3cap+1f,
     0x1.0865dcp+1f,
     0x1.efe1dcp+0f,
     0,
     0},
    {0,
     0,
     0,
     0,
     0,
     0,
     0,
     0x1.d5eda6p+10f,
     0,
     0,
     0x1.207758p+9f,
     0,
     0x1.4bcb36p+8f,
     0x1.cc209ap+7f,
     0x1.b0cf6ap+7f,
     0x1.3a9b1ep+7f,
     -0x1.6a18e8p+6f,
     -0x1.087dc8p+6f,
     -0x1.83843cp+5f,
     -0x1.170fb2p+5f,
     -0x1.939542p+4f,
     -0x1.20a37ap+4f,
     -0x1.9c41bep+3f,
     -0x1.2eed62p+3f,
     -0x1.bbea12p+2f,
     -0x1.35634ep+2f,
     -0x1.b8bb7ep+1f,
     -0x1.3be058p+1f,
     -0x1.c09b28p+0f,
     -0x1.388a8ap+0f,
     0,
     0},
    {0,
     0,
     0,
     0,
     0,
     0,
     0,
     0x1.d5fc56p+21f,
     0,
     0,
     0x1.80c334p+18f,
     0,
     0x1.0998dep+17f,
     0x1.0727ap+16f,
     0x1.2c8facp+12f,
     0x1.895068p+11f,
     0x1.189ab2p+12f,
     0x1.24a228p+11f,
     0x1.319bd6p+10f,
     0x1.369afp+9f,
     0x1.3cce2p+8f,
     0x1.3eff4ap+7f,
     0x1.3efb16p+6f,
     0x1.55695ap+5f,
     0x1.6a5bfap+4f,
     0x1.5f728ap+3f,
     0x1.63324p+2f,
     0x1.6f5ce4p+1f,
     0x1.754082p+0f,
     0x1.711abap-1f,
     0,
     0},
    {0,
     0,
     0,
     0,
     0,
     0,
     0,
     0x1.d60b06p+32f,
     0,
     0,
     0x1.009a3p+28f,
     0,
     0x1.a93706p+25f,
     0x1.2d016ap+24f,
     -0x1.143328p+22f,
     -0x1.aab73ep+20f,
     -0x1.8afa0cp+16f,
     -0x1.264b32p+15f,
     -0x1.b3c95p+13f,
     -0x1.38ed74p+12f,
     -0x1.bf46fep+10f,
     -0x1.3d2642p+9f,
     -0x1.b8e456p+7f,
     -0x1.576f5cp+6f,
     -0x1.06119ap+5f,
     -0x1.617edp+3f,
     -0x1.f6a0bep+1f,
     -0x1.760c68p+0f,
     -0x1.0db56ap-1f,
     -0x1.78b5cap-3f,
     0,
     0},
};

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
  static I left(I a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
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
    const F p = fma(one_plus, set1(2.0f), set1(0x1p-12f - 3.0f));
    const F q = _mm512_fnmadd_ps(p, p, set1(1.0f));
    const I piece = right<22>(_mm512_castps_si512(q));
    F g = coefficient(3, piece);
    g = fma(g, q, coefficient(2, piece));
    g = fma(g, q, coefficient(1, piece));
    g = fma(g, q, coefficient(0, piece));
    return _mm512_mul_ps(g, p);
  }
  static F coefficient(int power, I piece) {
    return _mm512_permutex2var_ps(_mm512_load_ps(kHalfOctaves[power]), piece,
                                  _mm512_load_ps(kHalfOctaves[power] + 16));
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
    return as_float(_mm512_ternarylogic_epi32(as_bits(a), moved, bits(0x80000000u), 0x78));
  }
  static D flip(D a, W words, int n) {
    const W moved = _mm512_slli_epi64(words, static_cast<unsigned>(n));
    return _mm512_castsi512_pd(
        _mm512_ternarylogic_epi64(_mm512_castpd_si512(a), moved, set(uint64_t{1} << 63), 0x78));
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
