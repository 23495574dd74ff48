// The error as operands of the tensor cores.
#pragma once

#include "../entries.h"

namespace dfa {

// Splits a float into bf16 terms, the largest first. Each gives 8 more of its bits, and three
// all 24. What a term leaves is signed, so each rounding is to nearest. Infinities and NaN are the
// first term alone. A number that would round to infinity is cut off instead.
DFA_HOST_DEVICE void split_bf16(float value, int terms, uint16_t (&term)[3]) {
  constexpr uint32_t kExponent = 0x7f800000u;
  for (int i = 0; i < 3; ++i) {
    if (i >= terms) break;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & kExponent) == kExponent) {
      const bool nan = (bits & ~kExponent & 0x7fffffffu) != 0;
      term[i] = static_cast<uint16_t>(bits >> 16 | (nan ? 0x40u : 0u));
      value = 0.0f;
      continue;
    }
    term[i] = bfloat16_bits(value);
    if ((term[i] & 0x7f80u) == 0x7f80u) term[i] = static_cast<uint16_t>(bits >> 16);
    value -= bfloat16_value(term[i]);  // exact
  }
}

}  // namespace dfa
