// What every backend's projection receives: plain structs, no torch types.
#pragma once

#include <cstdint>
#include <vector>

#include "entries.h"

namespace dfa {

enum class Type { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int64_t type_bytes(Type type) {
  return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2;
}

// The part of U that is read: entry (r, c) of the argument is U[row + r, column_offset + c].
struct Stream {
  uint64_t seed;
  Distribution distribution;
  int64_t column_offset;
};

// One layer: out[m, i] = scale * sum_c error[m, c] * U[row_offset + i, column_offset + c].
// Uniform entries are read as their exact lattice, so `scale` carries their sqrt(3).
struct Range {
  uint64_t row_offset;
  int64_t size;
  double scale;
  void* out;  // [M, size], contiguous
};

struct ErrorMatrix {
  const void* data;  // [rows, columns], contiguous
  int64_t rows;
  int64_t columns;
  Type type;
};

// Signals of all layers in one pass over the union of their row ranges.
void project_cpu(const Stream& stream, const ErrorMatrix& error, std::vector<Range> ranges,
                 Type out_type);

// U itself, [rows, columns] row-major, unit variance.
void feedback_matrix_cpu(const Stream& stream, uint64_t row_offset, int64_t rows, int64_t columns,
                         Type type, void* out);

}  // namespace dfa
