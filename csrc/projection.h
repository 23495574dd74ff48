// What every backend's projection receives: plain structs, no torch types.
//
// `rows` are always rows of U; the rows of the error are the batch.
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

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Which matrix: its entry (r, c) is U[r, column_offset + c].
struct Stream {
  uint64_t seed;
  Distribution distribution;
  int64_t column_offset;
};

// One layer: out[m, i] = scale * sum_c error[m, c] * U[row_offset + i, column_offset + c].
// Entries are read without their distribution's factor, which `scale` therefore carries.
struct Layer {
  uint64_t row_offset;
  int64_t size;
  double scale;
  void* out;  // [batch, size], contiguous

  DFA_HOST_DEVICE uint64_t end() const { return row_offset + static_cast<uint64_t>(size); }
};

struct ErrorMatrix {
  const void* data;  // [batch, columns], contiguous
  int64_t batch;
  int64_t columns;
  Type type;
};

// Signals of all layers in one pass over the union of their rows.
void project_cpu(const Stream& stream, const ErrorMatrix& error, std::vector<Layer> layers,
                 Type out_type);

// The same of structured feedback, and its transpose: error[m, c] = sum over layers of
// scale * signal[m, i] * U[row_offset + i, column_offset + c]. There `out` of a layer is its
// signal, of type `in_type`. Their arithmetic is the definition's (dfa_kernels/hadamard.py).
void project_structured_cpu(const Stream& stream, const ErrorMatrix& error,
                            const std::vector<Layer>& layers, Type out_type);
void adjoint_structured_cpu(const Stream& stream, const std::vector<Layer>& layers, Type in_type,
                            int64_t batch, int64_t columns, Type out_type, void* out);

// U itself, [rows, columns] row-major, unit variance.
void feedback_matrix_cpu(const Stream& stream, uint64_t row_offset, int64_t rows, int64_t columns,
                         Type type, void* out);

void feedback_matrix_structured_cpu(const Stream& stream, uint64_t row_offset, int64_t rows,
                                    int64_t columns, Type type, void* out);

// An error on a GPU. Strides count elements.
struct StridedMatrix {
  const void* data;
  int64_t batch, columns, batch_stride, column_stride;
  Type type;
};

// Returns device memory that lives until everything launched on the stream so far is done.
using Allocate = std::function<void*(int64_t bytes)>;

// Overrides of automatic choices, for tests.
struct Forced {
  int64_t tile = -1;                     // index of a tile; -1: the fastest by estimate
  int64_t processors = 0;                // multiprocessors to launch blocks for; 0: all
  int64_t transformed_bytes = 32 << 20;  // of workspace for structured feedback, at most
};

// Runs on the current device, in order on `cuda_stream` (a cudaStream_t), without waiting for it.
// The error is not fp64. `terms` is the number of bf16 terms of an fp32 error, 1 to 3; it is 1 for
// the other types.
void project_cuda(const Stream& stream, const StridedMatrix& error, std::vector<Layer> layers,
                  Type out_type, int terms, const Forced& forced, const Allocate& allocate,
                  void* cuda_stream);

struct Tile {
  int64_t index;
  std::string name;  // "rows x batch", and what else tells it apart
};

// The tiles that project_cuda may take for such an error on the current device.
std::vector<Tile> cuda_tiles(Distribution distribution, Type error_type, int terms);

// The same of structured feedback, also of fp64, and its transpose; see project_structured_cpu.
void project_structured_cuda(const Stream& stream, const StridedMatrix& error,
                             const std::vector<Layer>& layers, Type out_type, const Forced& forced,
                             const Allocate& allocate, void* cuda_stream);
void adjoint_structured_cuda(const Stream& stream, const std::vector<Layer>& layers, Type in_type,
                             int64_t batch, int64_t columns, Type out_type, void* out,
                             const Allocate& allocate, void* cuda_stream);

// `lattice`: entries without their distribution's factor.
void feedback_matrix_cuda(const Stream& stream, uint64_t row_offset, int64_t rows, int64_t columns,
                          Type type, bool lattice, void* out, void* cuda_stream);
void feedback_matrix_structured_cuda(const Stream& stream, uint64_t row_offset, int64_t rows,
                                     int64_t columns, Type type, void* out, void* cuda_stream);

}  // namespace dfa
