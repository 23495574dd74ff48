// The kernels of one instruction set, as a table of plain functions. Every set is compiled into the
// one binary; `kernels()` is the set in use.
#pragma once

#include <cstdint>

#include "../projection.h"

namespace dfa {

// A unit is 8 columns that start at a multiple of 8.
constexpr int kUnitColumns = 8;

// A tile of U for the projection: `panel` rows from `row` on, `units` column units from `unit` on.
// The rows must not cross a multiple of 2^32; rows the caller does not need are made and ignored.
struct TileSpec {
  uint64_t seed;
  Distribution distribution;
  uint64_t row;
  int64_t unit;
  int64_t units;
};

// One step of the product: acc[m][r] (+)= sum_k error[k][m] * tile[k][r], r over a panel of rows.
struct MultiplySpec {
  const void* error;  // packed [depth][block]
  const void* tile;   // [depth][panel]
  void* acc;          // [block][acc_stride]
  int64_t depth;
  int64_t acc_stride;
  int block;        // rows of error, 1..max_block
  bool accumulate;  // false: acc is written, not read
};

// out[m][i] = scale * acc[m][i], rounded once.
struct ScaleSpec {
  const void* acc;
  int64_t acc_stride;
  void* out;
  int64_t out_stride;
  int64_t rows;
  int64_t columns;
  double scale;
  bool past_caches;  // for more than they hold
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
};

using MultiplyKernel = void (*)(const MultiplySpec&);
using ScaleKernel = void (*)(const ScaleSpec&);
using FillKernel = void (*)(const FillSpec&);

struct Kernels {
  const char* name;
  int panel;
  int max_block_f32;
  int max_block_f64;
  void (*tile_f32)(const TileSpec&, float* tile);      // [columns][panel]
  void (*tile_bf16)(const TileSpec&, uint32_t* tile);  // [columns / 2][panel] pairs, low half first
  MultiplyKernel multiply_f32;
  MultiplyKernel multiply_f64;
  MultiplyKernel multiply_bf16;  // null without a bf16 dot product: bf16 errors become fp32
  ScaleKernel scale_f32[4];      // by output Type
  ScaleKernel scale_f64[4];
  FillKernel fill[4];  // by output Type
};

// The table in use: the forced one, else the best this CPU runs.
const Kernels& kernels();

// Forces a path by name ("" returns to automatic). False if the name is unknown or cannot run here.
bool force_kernels(const char* name);

// Whether the CPU multiplies bf16 numbers faster than fp32 ones.
bool has_fast_bf16();

// Null where the binary or the CPU lacks the set.
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

}  // namespace dfa
