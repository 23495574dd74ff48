// Brings rows of the error into the order the product reads them: [tile][block of
// rows][depth][row].
#pragma once

#include <cstring>

#include "../projection.h"

namespace dfa {

// `depth` elements of `block` rows from column `column` on. Columns outside [0, error.columns) are
// zero.
struct PackSpec {
  const ErrorMatrix* error;
  int64_t row;
  int block;
  int64_t column;
  int64_t depth;
  void* out;
};

using PackKernel = void (*)(const PackSpec&);

inline float half_value(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;  // the exponent's new bias; subnormal halves become normal floats here
  std::memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x7c00u) bits |= 0x7f800000u;
  bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

struct BFloat16Source {
  uint16_t bits;
};
struct HalfSource {
  uint16_t bits;
};
inline float widen(BFloat16Source value) { return bfloat16_value(value.bits); }
inline float widen(HalfSource value) { return half_value(value.bits); }

template <class Source, class Out>
void pack(const PackSpec& spec) {
  for (int m = 0; m < spec.block; ++m) {
    const Source* row =
        static_cast<const Source*>(spec.error->data) + (spec.row + m) * spec.error->columns;
    Out* out = static_cast<Out*>(spec.out) + m;
    for (int64_t k = 0; k < spec.depth; ++k) out[k * spec.block] = widen(row[spec.column + k]);
  }
}

// Pairs of bf16 columns; a pair may stick out by one column at either end.
inline void pack_pairs(const PackSpec& spec) {
  const int64_t columns = spec.error->columns;
  for (int m = 0; m < spec.block; ++m) {
    const uint16_t* row = static_cast<const uint16_t*>(spec.error->data) + (spec.row + m) * columns;
    uint32_t* out = static_cast<uint32_t*>(spec.out) + m;
    for (int64_t k = 0; k < spec.depth; ++k) {
      const int64_t c = spec.column + 2 * k;
      const uint32_t low = c >= 0 ? row[c] : 0, high = c + 1 < columns ? row[c + 1] : 0;
      out[k * spec.block] = low | high << 16;
    }
  }
}

}  // namespace dfa
