// What runs before the projection: it makes the error into operands.
#pragma once

#include "../projection.h"
#include "device.h"
#include "fragments.h"
#include "split.h"

namespace dfa {

struct PrepareParameters {
  const void* error;  // [batch, columns], any strides
  int64_t batch, columns, batch_stride, column_stride;
  Type type;
  int32_t terms;
  int64_t head;         // columns of zeros before the error's
  int64_t out_columns;  // with zeros on both sides, a multiple of 8, or of 32 if they are permuted
  bool permuted;        // as `group_column` says
  uint16_t* out;        // [terms, batch, out_columns], bf16, or fp16 for an fp16 error
};

DFA_KERNEL(256, 1) prepare(DFA_ARGUMENT PrepareParameters p) {
  const int64_t pieces = p.out_columns / 8;
  const int64_t step = int64_t{256} * device::blocks();
  for (int64_t i = int64_t{256} * device::block() + device::thread(); i < p.batch * pieces;
       i += step) {
    const int64_t row = i / pieces, piece = i % pieces;
    uint16_t term[8][3] = {};
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int64_t place = p.permuted
                                ? piece / 4 * 32 + group_column(static_cast<int>(piece % 4) * 8 + c)
                                : piece * 8 + c;
      const int64_t column = place - p.head;
      if (column < 0 || column >= p.columns) continue;
      const int64_t from = row * p.batch_stride + column * p.column_stride;
      if (p.type == Type::kFloat32) {
        split_bf16(static_cast<const float*>(p.error)[from], p.terms, term[c]);
      } else {
        term[c][0] = static_cast<const uint16_t*>(p.error)[from];
      }
    }
#pragma unroll
    for (int t = 0; t < 3; ++t) {
      if (t >= p.terms) break;
      Words16 words{};
      uint32_t* const word[] = {&words.x, &words.y, &words.z, &words.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        *word[c] = static_cast<uint32_t>(term[2 * c][t]) | static_cast<uint32_t>(term[2 * c + 1][t])
                                                               << 16;
      }
      // No streaming store: it is read again at once.
      *reinterpret_cast<Words16*>(p.out + (t * p.batch * pieces + i) * 8) = words;
    }
  }
}

}  // namespace dfa
