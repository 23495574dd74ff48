// Packs the error in the order the product reads it: [tile][slice of the batch], and in that
// [depth][row], or [row][depth] by rows.
#pragma once

#include "../projection.h"
#include "convert.h"

namespace dfa {

// `depth` elements from column `column` on, of the `batch` error rows from `first` on. Columns
// outside [0, error.columns) are zero.
struct PackSpec {
  const ErrorMatrix* error;
  int64_t first;
  int batch;
  int64_t column;
  int64_t depth;
  bool by_rows;
  void* out;

  int64_t row_stride() const { return by_rows ? depth : 1; }
  int64_t depth_stride() const { return by_rows ? 1 : batch; }
};

using PackKernel = void (*)(const PackSpec&);

template <class Source, class Out>
void pack(const PackSpec& spec) {
  for (int m = 0; m < spec.batch; ++m) {
    const Source* row =
        static_cast<const Source*>(spec.error->data) + (spec.first + m) * spec.error->columns;
    Out* out = static_cast<Out*>(spec.out) + m * spec.row_stride();
    const int64_t step = spec.depth_stride();
    for (int64_t k = 0; k < spec.depth; ++k) out[k * step] = widen(row[spec.column + k]);
  }
}

// Pairs of bf16 columns. The first and the last pair may have one column outside the error.
inline void pack_pairs(const PackSpec& spec) {
  const int64_t columns = spec.error->columns;
  for (int m = 0; m < spec.batch; ++m) {
    const uint16_t* row =
        static_cast<const uint16_t*>(spec.error->data) + (spec.first + m) * columns;
    uint32_t* out = static_cast<uint32_t*>(spec.out) + m * spec.row_stride();
    const int64_t step = spec.depth_stride();
    for (int64_t k = 0; k < spec.depth; ++k) {
      const int64_t c = spec.column + 2 * k;
      const uint32_t low = c >= 0 ? row[c] : 0, high = c + 1 < columns ? row[c + 1] : 0;
      out[k * step] = low | high << 16;
    }
  }
}

}  // namespace dfa
