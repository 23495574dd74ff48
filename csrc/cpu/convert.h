// Conversions between fp32 and 16-bit types, by arithmetic that compilers vectorise. Rounding is to
// nearest even, and happens once.
#pragma once

#include "../entries.h"
#include "../odd.h"

namespace dfa {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value == value ? rounded : 0x7fc0u)};
}

inline Half to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Below 2^-14, adding 0.5 rounds to a multiple of 2^-24 and leaves it in the low bits.
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return {static_cast<uint16_t>(sign | result)};
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return bfloat16_value(value.bits); }
inline float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  // The factor moves to fp32's exponent bias, and makes subnormal halves normal.
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  if (magnitude >= 0x7c00u) bits |= 0x7f800000u;
  return bit_cast<float>(bits | static_cast<uint32_t>(value.bits & 0x8000u) << 16);
}

template <class Out>
Out round_to(float value) {
  if constexpr (__is_same(Out, BFloat16))
    return to_bfloat16(value);
  else if constexpr (__is_same(Out, Half))
    return to_half(value);
  else
    return static_cast<Out>(value);
}

template <class Out>
Out round_to(double value) {
  if constexpr (__is_same(Out, BFloat16))
    return to_bfloat16(to_odd(value));
  else if constexpr (__is_same(Out, Half))
    return to_half(to_odd(value));
  else
    return static_cast<Out>(value);
}

}  // namespace
}  // namespace dfa
