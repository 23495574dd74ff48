// The fused projection: a warp makes rows of U as operands in its registers, multiplies them with
// the error staged in shared memory, and writes the sums, scaled, to every layer with those rows.
//
// A block of threads takes tiles of [rows of U] x [rows of the error] in turn. Each entry of U is
// made once per tile of error rows, whatever the number of layers and of terms of the error.
#pragma once

#include "generator.h"
#include "schedule.h"

namespace dfa {

struct FusedParameters {
  const uint16_t* error;  // [terms][rows][columns], bf16 or fp16; what matters is 16-byte aligned
  int64_t row_stride, term_stride;
  int64_t rows, columns;  // columns: a multiple of 8
  int64_t row_tiles;      // of U
  int64_t items;          // row_tiles times the tiles of error rows
  int32_t chunks;         // of columns, at least 1
  int32_t terms;
  Type out_type;
  uint32_t first_block;  // Philox column block of column 0
  RoundKeys keys;
  LayerTable table;
};
static_assert(sizeof(FusedParameters) <= 4096, "what a kernel may be given on every GPU");

// The tile of one block: N fragments of 8 error rows by `WARPS` x F fragments of 16 rows of U.
template <int N, int F, int WARPS, int BLOCKS>
struct Shape {
  static constexpr int kN = N, kF = F, kWarps = WARPS;
  static constexpr int kThreads = 32 * WARPS;
  static constexpr int kBlocks = BLOCKS;  // that a multiprocessor should hold, for the registers
  static constexpr int kErrors = kFragmentErrors * N;
  static constexpr int kWarpRows = kFragmentRows * F;
  static constexpr int kRows = kWarpRows * WARPS;
  static constexpr int kStagedN = N < 4 ? N : 4;
  // With 4 mod 16 floats to a row of staged sums, the quads of a warp write to different banks.
  static constexpr int kSumStride = kWarpRows + 4;
  static constexpr int kSumFloats = kFragmentErrors * kStagedN * kSumStride;  // of a warp
};

constexpr int kStages = 2;

// Starts the copies of one chunk of columns of one tile of error rows into a stage.
template <class S>
DFA_DEVICE void stage_error(const FusedParameters& p, int64_t error_row, int32_t chunk,
                            char* stage) {
  constexpr int kStep = S::kThreads / kPieces;  // even, so that a thread's places keep their parity
  const int piece = device::thread() % kPieces, first = device::thread() / kPieces;
  const int64_t column = int64_t{kChunkColumns} * chunk + 8 * piece;
  const int64_t left = column < p.columns ? p.rows - error_row : 0;  // rows there are
  const int rows = left < S::kErrors ? static_cast<int>(left) : S::kErrors;
  const uint16_t* of_term = p.error + (error_row * p.row_stride + column);
  char* to = stage + staged_byte(first, piece);
#pragma unroll 1
  for (int term = 0; term < p.terms; ++term) {
    const uint16_t* from = of_term + first * p.row_stride;
#pragma unroll
    for (int row = 0; row < S::kErrors; row += kStep) {
      if (S::kErrors >= kStep || first < S::kErrors) {
        device::copy_async(to + row * kChunkBytes, from, row + first < rows);
      }
      from += kStep * p.row_stride;
    }
    of_term += p.term_stride;
    to += S::kErrors * kChunkBytes;
  }
}

// sums += U's rows of this warp times one staged chunk.
template <class S, Distribution kDistribution, Operand kOperand>
DFA_DEVICE void multiply_chunk(const FusedParameters& p,
                               Generator<kDistribution, kOperand, S::kF>& generator, int32_t chunk,
                               const char* stage, int lane, float (&sums)[S::kF][S::kN][4]) {
  const int64_t left = p.columns - int64_t{kChunkColumns} * chunk;
#pragma unroll 1
  for (int half = 0; half < kChunkColumns / kBlock32; ++half) {
    if (left <= half * kBlock32) break;
    uint32_t a[S::kF][2][4];
    generator.make(p.keys, p.first_block, static_cast<uint32_t>(2 * chunk + half), lane, a);
    const int piece = 4 * half + lane % 4;
    // Of these 32 columns, the smallest terms first.
#pragma unroll 1
    for (int term = p.terms - 1; term >= 0; --term) {
      const char* from = stage + term * S::kErrors * kChunkBytes + staged_byte(lane / 4, piece);
#pragma unroll
      for (int n = 0; n < S::kN; ++n) {
        // A whole fragment further down, a row keeps its parity and so its place.
        const Words16 b =
            *reinterpret_cast<const Words16*>(from + n * kFragmentErrors * kChunkBytes);
#pragma unroll
        for (int f = 0; f < S::kF; ++f) {
          if constexpr (kOperand == Operand::kHalf) {
            device::multiply_half(sums[f][n], a[f][0], b.x, b.y);
            device::multiply_half(sums[f][n], a[f][1], b.z, b.w);
          } else {
            device::multiply_bf16(sums[f][n], a[f][0], b.x, b.y);
            device::multiply_bf16(sums[f][n], a[f][1], b.z, b.w);
          }
        }
      }
    }
  }
}

// Staged sums [errors][rows] of a warp into a layer: neighbouring lanes hold neighbouring rows,
// which are neighbours in memory.
template <class S, class Out, class Round>
DFA_DEVICE void write_sums(const float* staged, int errors, int begin, int end, int64_t size,
                           Out* out, int lane, const Round& round) {
  constexpr int kTogether = 32 / S::kWarpRows;  // error rows written at once
  const int row = lane % S::kWarpRows;
  if (row < begin || row >= end) return;
#pragma unroll 4
  for (int m = lane / S::kWarpRows; m < errors; m += kTogether) {
    device::store_streaming(out + m * size + row, round(staged[m * S::kSumStride + row]));
  }
}

template <class S>
DFA_DEVICE void write_layer(const FusedParameters& p, const LayerEntry& layer, uint64_t row,
                            uint64_t end, int64_t error_row, int errors, const float* staged,
                            int lane) {
  const uint64_t first = layer.row > row ? layer.row : row;
  const uint64_t last = layer.end < end ? layer.end : end;
  const int begin_row = static_cast<int>(first - row), end_row = static_cast<int>(last - row);
  const int64_t size = static_cast<int64_t>(layer.end - layer.row);
  // Of the warp's row 0, which may lie before the layer's first.
  const int64_t offset = error_row * size + static_cast<int64_t>(row - layer.row);
  const float scale = static_cast<float>(layer.scale);
  const auto write = [&](auto* none, const auto& round) {
    auto* out = reinterpret_cast<decltype(none)>(layer.out) + offset;
    write_sums<S>(staged, errors, begin_row, end_row, size, out, lane, round);
  };
  switch (p.out_type) {
    case Type::kFloat32:
      return write(static_cast<float*>(nullptr), [=](float sum) { return sum * scale; });
    case Type::kBFloat16:
      return write(static_cast<uint16_t*>(nullptr), [=](float sum) {
        return static_cast<uint16_t>(device::pack_bf16(sum * scale, 0.0f));
      });
    case Type::kFloat16:
      return write(static_cast<uint16_t*>(nullptr), [=](float sum) {
        return static_cast<uint16_t>(device::pack_half(sum * scale, 0.0f));
      });
    case Type::kFloat64:
      return write(static_cast<double*>(nullptr),
                   [scale = layer.scale](float sum) { return sum * scale; });
  }
}

// The sums of a warp's rows, which are [row, end), to all layers that have some of them.
template <class S>
DFA_DEVICE void write_layers(const FusedParameters& p, uint64_t row, uint64_t end,
                             int64_t error_row, float* staged, int lane,
                             const float (&sums)[S::kF][S::kN][4]) {
#pragma unroll 1
  for (int first = 0; first < S::kN; first += S::kStagedN) {
    const int64_t from = error_row + kFragmentErrors * first;
    if (from >= p.rows) break;
    device::sync_warp();
#pragma unroll
    for (int n = 0; n < S::kN; ++n) {
      if (n < first || n >= first + S::kStagedN) continue;
#pragma unroll
      for (int f = 0; f < S::kF; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = kFragmentErrors * (n % S::kStagedN) + sum_error(lane, i);
          staged[m * S::kSumStride + kFragmentRows * f + sum_row(lane, i)] = sums[f][n][i];
        }
      }
    }
    device::sync_warp();
    const int64_t left = p.rows - from;
    constexpr int kMost = kFragmentErrors * S::kStagedN;
    const int errors = left < kMost ? static_cast<int>(left) : kMost;
    for (int top = p.table.layers_before(end); top > 0; top -= 32) {
      if (p.table.reach(top - 1) <= row) break;
      const int mine = top - 1 - lane;
      const bool overlaps = mine >= 0 && p.table.layer_end(mine) > row;
      for (uint32_t left_over = device::ballot(overlaps); left_over != 0;
           left_over &= left_over - 1) {
        const LayerEntry layer = p.table.layer(top - 1 - device::lowest_bit(left_over));
        write_layer<S>(p, layer, row, end, from, errors, staged, lane);
      }
    }
  }
}

// The tensor cores cut their sums off where fp32 arithmetic rounds them, so that errors of many
// additions add up. Exact sums are those of single chunks, added with rounding.
template <class S>
DFA_DEVICE void add_sums(const float (&part)[S::kF][S::kN][4], float (&sums)[S::kF][S::kN][4]) {
#pragma unroll
  for (int f = 0; f < S::kF; ++f) {
#pragma unroll
    for (int n = 0; n < S::kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[f][n][i] += part[f][n][i];
    }
  }
}

template <class S, Distribution kDistribution, Operand kOperand>
DFA_KERNEL(S::kThreads, S::kBlocks)
fused(DFA_ARGUMENT FusedParameters p) {
  const int lane = device::thread() % 32, warp = device::thread() / 32;
  const int stage_bytes = p.terms * S::kErrors * kChunkBytes;
  char* stage = device::shared();
  char* other = stage + stage_bytes;
  float* staged =
      reinterpret_cast<float*>(device::shared() + kStages * stage_bytes) + warp * S::kSumFloats;

  // What a stage holds: error tile * chunks + chunk. A short error stays where it is.
  int64_t held = -1, held_other = -1;
  bool loading = false;
  const auto fetch = [&](int64_t error_tile, int32_t chunk, char* to) {
    stage_error<S>(p, error_tile * S::kErrors, chunk, to);
  };
  int64_t item = device::block();
  if (item < p.items) {
    held = item / p.row_tiles * p.chunks;
    fetch(item / p.row_tiles, 0, stage);
    loading = true;
  }
  for (; item < p.items; item += device::blocks()) {
    const int64_t error_tile = item / p.row_tiles, next = item + device::blocks();
    const int64_t next_error_tile = next / p.row_tiles;
    const RowTile tile = p.table.tile(item % p.row_tiles, S::kRows);
    const uint64_t row = tile.row + static_cast<uint64_t>(warp * S::kWarpRows);
    Generator<kDistribution, kOperand, S::kF> generator;
    generator.start(p.keys, row, lane);
    float sums[S::kF][S::kN][4] = {};
#pragma unroll 1
    for (int32_t chunk = 0; chunk < p.chunks; ++chunk) {
      const bool last = chunk + 1 == p.chunks;
      const int64_t after_tile = last ? next_error_tile : error_tile;
      const int32_t after_chunk = last ? 0 : chunk + 1;
      const int64_t after = after_tile * p.chunks + after_chunk;
      const bool load = (!last || next < p.items) && held_other != after;
      if (loading || load) {
        device::wait_copies();
        device::sync_block();
      }
      if (load) {
        fetch(after_tile, after_chunk, other);
        held_other = after;
      }
      loading = load;
      if constexpr (kOperand == Operand::kExact) {
        float part[S::kF][S::kN][4] = {};
        multiply_chunk<S>(p, generator, chunk, stage, lane, part);
        add_sums<S>(part, sums);
      } else {
        multiply_chunk<S>(p, generator, chunk, stage, lane, sums);
      }
      char* const swapped = stage;
      stage = other;
      other = swapped;
      const int64_t swapped_held = held;
      held = held_other;
      held_other = swapped_held;
    }
    const uint64_t tile_end = tile.row + static_cast<uint64_t>(tile.rows);
    const uint64_t warp_end = row + S::kWarpRows;
    const uint64_t end = warp_end < tile_end ? warp_end : tile_end;
    if (row < end) write_layers<S>(p, row, end, error_tile * S::kErrors, staged, lane, sums);
  }
}

}  // namespace dfa
