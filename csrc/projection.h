// What every backend's projection receives: plain structs, no torch types.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "entries.h"

namespace dfa {

enum class Type { kFloat32, kBFloat16, kFloat16, kFloat64 };

DFA_HOST_DEVICE constexpr int64_t type_bytes(Type type) {
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

// The same on a GPU; strides count elements.
struct StridedMatrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
  Type type;  // not kFloat64
};

// Device memory that lives until what is launched on the stream so far is done.
using Allocate = std::function<void*(int64_t bytes)>;

// What tests may want otherwise than it would be chosen.
struct Forced {
  int64_t tile = -1;       // the index of a tile
  int64_t processors = 0;  // multiprocessors to launch blocks for; 0: as many as there are
};

// On the current device; `cuda_stream` is a cudaStream_t. `terms`: bf16 terms of an fp32 error, 1
// to 3; 1 for the other types. Nothing waits for the GPU.
void project_cuda(const Stream& stream, const StridedMatrix& error, std::vector<Range> ranges,
                  Type out_type, int terms, const Forced& forced, const Allocate& allocate,
                  void* cuda_stream);

struct Tile {
  int64_t index;
  std::string name;  // "rows of U x rows of the error", and what else tells it apart
};

// The tiles that project_cuda may take for such an error on the current device.
std::vector<Tile> cuda_tiles(Distribution distribution, Type error_type, int terms);

// `lattice`: uniform entries as their exact lattice, without sqrt(3).
void feedback_matrix_cuda(const Stream& stream, uint64_t row_offset, int64_t rows, int64_t columns,
                          Type type, bool lattice, void* out, void* cuda_stream);

}  // namespace dfa
