// Entries of whole vectors of Philox words. One shift and one bitwise operation turn a halfword's
// top bits into the mantissa of a number in [1, 2), which saves the conversion from integer.
#pragma once

namespace dfa {
namespace {

constexpr uint32_t kFloatOne = 0x3f800000u, kFloatSign = 0x80000000u;
constexpr uint32_t kPairOnes = 0x3f803f80u, kPairSigns = 0x80008000u;

template <class S, uint32_t kMantissa>
typename S::F low_halves(typename S::I words) {
  return S::as_float(S::mask_or(S::template left<7>(words), kMantissa, kFloatOne));
}
template <class S, uint32_t kMantissa>
typename S::F high_halves(typename S::I words) {
  return S::as_float(S::mask_or(S::template right<9>(words), kMantissa, kFloatOne));
}

// Entries are bits whose upper half is the bf16 entry; as_floats() clears the lower half.
template <class S>
struct Normal {
  static typename S::I even(typename S::I words) { return round(low_halves<S, 0x7ff800u>(words)); }
  static typename S::I odd(typename S::I words) { return round(high_halves<S, 0x7ff800u>(words)); }
  static typename S::F as_floats(typename S::I bits) {
    return S::as_float(S::mask(bits, 0xffff0000u));
  }

 private:
  // No quantile is near a tie, so adding half a unit of the upper half rounds to nearest.
  static typename S::I round(typename S::F one_plus) {
    return S::plus(S::as_bits(S::quantile(one_plus)), S::bits(0x8000u));
  }
};

// The lattice (2k - 255) / 256 from 1 + k / 256: exact, in bf16 as well.
template <class S>
struct UniformLattice {
  static typename S::I even(typename S::I words) {
    return lattice(low_halves<S, 0x7f8000u>(words));
  }
  static typename S::I odd(typename S::I words) {
    return lattice(high_halves<S, 0x7f8000u>(words));
  }
  static typename S::F as_floats(typename S::I bits) { return S::as_float(bits); }

 private:
  static typename S::I lattice(typename S::F one_plus) {
    return S::as_bits(S::fma(one_plus, S::set1(2.0f), S::set1(-2.0f - 255.0f / 256.0f)));
  }
};

}  // namespace
}  // namespace dfa
