// The kernels of one instruction set, as a table of plain functions. The binary holds every set;
// `kernels()` is the one in use.
#pragma once

#include <cstdint>

#include "../projection.h"

namespace dfa {

// A tile of U for the projection: `panel` rows from `row` on, `units` of kUnitColumns columns from
// `unit` on. The rows must not cross a multiple of 2^32. A panel is always made whole.
struct TileSpec {
  uint64_t seed;
  Distribution distribution;
  uint64_t row;
  int64_t unit;
  int64_t units;
};

// A step of the product: acc[m][r] (+)= sum_k error[k][m] * tile[k][r], m over the batch, r over a
// panel of rows. The kernels named dot_* have the columns in their lanes, and a panel is one row.
struct MultiplySpec {
  const void* error;  // packed [depth][batch], or [batch][error_stride]
  const void* tile;   // [depth][panel]
  void* acc;          // [batch][acc_stride]
  int64_t depth;
  int64_t error_stride;  // read by dot_*
  int64_t acc_stride;
  int batch;        // 1..max_batch, 1..kDotBatch, 1..kFusedBatch
  bool accumulate;  // false: acc is not read
  // If not null, the sums times `scale` go here instead of to acc, in their own type. Not by dot_*.
  void* out;  // [batch][out_stride]
  int64_t out_stride;
  double scale;
  int64_t begin;  // read by fused_* and multiply_kept: element of the tile where the depth begins
};
constexpr int kDotBatch = 4;
constexpr int kFusedBatch = 2;

// out[m][r] = scale * acc[m][r], rounded once, m over the batch, r over rows of U.
struct ScaleSpec {
  const void* acc;
  int64_t acc_stride;
  void* out;
  int64_t out_stride;
  int64_t batch;
  int64_t rows;
  double scale;
  bool past_caches;  // write around the caches
};

// Part of the feedback matrix, row-major.
struct FillSpec {
  uint64_t seed;
  Distribution distribution;
  uint64_t row;
  int64_t rows;
  int64_t column;
  int64_t columns;
  void* out;
  int64_t out_stride;
  bool lattice;  // entries without their distribution's factor
};

// Diagonals of structured feedback: those of `domain` for the input blocks [block, block + blocks)
// and the output block `output`, which is 0 in domains 1 and 2.
struct SignSpec {
  uint64_t seed;
  uint32_t domain;
  uint64_t output;
  int64_t block;
  int64_t blocks;
};

// A diagonal is a word of sign bits for every 32 numbers; this is the bit of number c of them.
constexpr int sign_bit(int c) { return c / 2 + 16 * (c % 2); }

constexpr bool is_negative(const uint32_t* diagonal, int64_t place) {
  return diagonal[place / 32] >> sign_bit(static_cast<int>(place % 32)) & 1;
}

// What structured feedback is made of, on aligned blocks of kHadamardBlock numbers; see hadamard.h.
struct TransformKernels {
  void (*transform)(const void* in, const uint32_t* signs, int64_t blocks, void* natural);
  void (*transform_natural)(const void* in, const uint32_t* signs, int64_t blocks, void* natural);
  void (*transform_signal)(const void* in, const uint32_t* signs, int64_t blocks, double factor,
                           bool past_caches, void* signal);
  void (*turn)(const void* in, void* out);
  void (*accumulate)(const void* in, const uint32_t* signs, int64_t blocks, void* sums);
};

using MultiplyKernel = void (*)(const MultiplySpec&);
using FusedKernel = void (*)(const TileSpec&, const MultiplySpec&);
using ScaleKernel = void (*)(const ScaleSpec&);
using FillKernel = void (*)(const FillSpec&);

struct Kernels {
  const char* name;
  int panel;
  int max_batch_f32;
  int max_batch_f64;
  void (*tile_f32)(const TileSpec&, float* tile);      // [columns][panel]
  void (*tile_bf16)(const TileSpec&, uint32_t* tile);  // [columns / 2][panel] pairs, low half first
  void (*unpack_tile)(const uint32_t* pairs, int64_t units, float* tile);
  MultiplyKernel multiply_f32;
  MultiplyKernel multiply_kept;  // fp32, of tiles of bf16 pairs, [columns / 2][panel]
  MultiplyKernel multiply_f64;
  MultiplyKernel multiply_bf16;  // null without a bf16 dot product: bf16 errors are widened
  // A panel of few errors, multiplied as it is made: `tile` of the second is not read.
  FusedKernel fused_f32;
  FusedKernel fused_bf16;  // null as multiply_bf16
  MultiplyKernel dot_f32;
  MultiplyKernel dot_f64;
  MultiplyKernel dot_bf16;   // null as multiply_bf16
  ScaleKernel scale_f32[4];  // by output Type
  ScaleKernel scale_f64[4];
  FillKernel fill[4];  // by output Type
  void (*make_signs)(const SignSpec&, uint32_t* words);
  TransformKernels transform_f32;
  TransformKernels transform_f64;
};

// The table in use: the forced one, else the best this CPU runs.
const Kernels& kernels();

// Forces a set by name; "" returns to the automatic choice. False if it is unknown or cannot run.
bool force_kernels(const char* name);

// Whether the CPU multiplies bf16 faster than fp32.
bool has_fast_bf16();

// Null if the binary or the CPU lacks the set.
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

}  // namespace dfa
