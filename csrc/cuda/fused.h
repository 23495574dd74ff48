// The fused projection. A warp makes rows of U as operands in its registers, multiplies them with
// the error staged in shared memory, and writes the scaled sums to every layer that has those rows.
//
// A block of threads takes tiles of [rows of U] x [batch] in turn. Each entry of U is made once per
// tile of the batch, however many layers there are and terms the error has. The block's warps
// divide the rows of U, or the columns, so that few rows keep all schedulers busy. In the second
// case each warp has its own sums of all rows; they are added up in the order of the warps.
#pragma once

#include "generator.h"
#include "schedule.h"

namespace dfa {

struct FusedParameters {
  const uint16_t* error;  // [terms][batch][columns], bf16 or fp16, rows aligned to 16 bytes
  int64_t batch_stride, term_stride;
  int64_t batch, columns;  // columns: a multiple of 8, of 32 for warpgroups
  int64_t row_tiles;       // of U
  int64_t items;           // row_tiles times the tiles of the batch
  int32_t steps;           // through the columns, a stage each; at least 1
  int32_t terms;
  Type out_type;
  uint32_t first_block;  // Philox column block of column 0
  RoundKeys keys;
  LayerTable table;
};
static_assert(sizeof(FusedParameters) <= 4096, "the limit of kernel arguments on every GPU");

// The tile of a block: N fragments of 8 error rows by F fragments of 16 rows of U for each warp. If
// the warps divide the columns into PARTS instead, it is the same tile for all of them. CHUNKS of
// columns of the error are staged at once; more of them need fewer barriers. With GROUPS, four
// warps multiply together, by wgmma. The sums of STAGED fragments of error rows are written at
// once.
template <int N, int F, int WARPS, int BLOCKS, int CHUNKS, int PARTS = 1, bool GROUPS = false,
          int STAGED = PARTS == 1 ? 4 : 2>
struct Shape {
  static_assert(PARTS == 1 || PARTS == WARPS, "all warps share their rows, or none do");
  static_assert(!GROUPS || (F == 1 && PARTS == 1 && WARPS % 4 == 0), "4 warps, with 16 rows each");
  static constexpr bool kGroups = GROUPS;  // products are those of warpgroups
  static constexpr int kN = N, kF = F, kWarps = WARPS, kChunks = CHUNKS, kParts = PARTS;
  static constexpr int kThreads = 32 * WARPS;
  static constexpr int kBlocks = BLOCKS;  // per multiprocessor, which limits the registers
  static constexpr int kBatch = kFragmentBatch * N;
  static constexpr int kWarpRows = kFragmentRows * F;
  static constexpr int kRows = kWarpRows * WARPS / PARTS;
  static constexpr int kStageColumns = kChunkColumns * CHUNKS;
  static constexpr int kTermBytes = kBatch * kChunkBytes * CHUNKS;  // of a stage
  // Strips of 32 columns in a stage, and those of one warp.
  static constexpr int kStageStrips = kStageColumns / kStripColumns,
                       kOwnStrips = kStageStrips / PARTS;
  static constexpr int kStagedN = N < STAGED ? N : STAGED;
  // Rows of staged sums are 4 mod 16 floats, so the quads of a warp write to different banks.
  static constexpr int kSumStride = kWarpRows + 4;
  static constexpr int kSumFloats = kFragmentBatch * kStagedN * kSumStride;  // of a warp
  static constexpr int kSumBytes = 4 * WARPS * kSumFloats;
};

constexpr int kStages = 2;

// What a thread copies of a tile of the batch: a piece of every kStep-th error row.
template <class S>
struct ErrorPieces {
  static constexpr int kAcross = kPieces * S::kChunks;
  static constexpr int kStep = S::kThreads / kAcross;
  static_assert(kStep % (S::kGroups ? 8 : 2) == 0,
                "all error rows of a thread have the same order of pieces");

  const uint16_t* from;
  int batch;  // error rows from its first on

  DFA_DEVICE static int piece() { return device::thread() % kAcross; }
  DFA_DEVICE static int first() { return device::thread() / kAcross; }

  DFA_DEVICE void start(const FusedParameters& p, int64_t tile) {
    const int64_t row = tile * S::kBatch + first();
    const int64_t left = p.batch - row;
    from = p.error + (row * p.batch_stride + 8 * piece());
    batch = left < S::kBatch ? static_cast<int>(left) : S::kBatch;
  }

  // Starts the copies of one step of columns into a stage: [terms][chunks][batch][columns].
  DFA_DEVICE void copy(const FusedParameters& p, int32_t step, char* stage) const {
    const int64_t column = int64_t{S::kStageColumns} * step;
    const int there = p.columns - column > 8 * piece() ? batch : 0;
    const uint16_t* of_term = from + column;
    const int byte = S::kGroups ? group_byte(first(), piece() % kPieces)
                                : staged_byte(first(), piece() % kPieces);
    char* to = stage + piece() / kPieces * (S::kBatch * kChunkBytes) + byte;
#pragma unroll 1
    for (int term = 0; term < p.terms; ++term) {
      const uint16_t* of_row = of_term;
#pragma unroll
      for (int row = 0; row < S::kBatch; row += kStep) {
        if (S::kBatch >= kStep || first() < S::kBatch) {
          device::copy_async(to + row * kChunkBytes, of_row, row < there);
        }
        of_row += kStep * p.batch_stride;
      }
      of_term += p.term_stride;
      to += S::kTermBytes;
    }
  }
};

// sums += this warp's rows of U times a strip of the error, `from` this lane's first piece on.
template <class S, Operand kOperand>
DFA_DEVICE void multiply_strip(const char* from, const uint32_t (&a)[S::kF][2][4],
                               float (&sums)[S::kF][S::kN][4]) {
#pragma unroll
  for (int n = 0; n < S::kN; ++n) {
    // A fragment further down, a row has the same parity and so the same order of pieces.
    const Words16 b = *reinterpret_cast<const Words16*>(from + n * kFragmentBatch * kChunkBytes);
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

// sums += this warp's rows of U times its part of the staged error.
template <class S, Distribution kDistribution, Operand kOperand>
DFA_DEVICE void multiply_step(const FusedParameters& p,
                              Generator<kDistribution, kOperand, S::kF>& generator, int32_t step,
                              const char* stage, int part, int lane,
                              float (&sums)[S::kF][S::kN][4]) {
  constexpr int kStrips = S::kStageStrips, kOwn = S::kOwnStrips;
  // How many strips follow one another. A warp that makes all columns has any number of them.
  constexpr int kRun = S::kParts == 1 ? 4 : kOwn;
  const int64_t left = p.columns - int64_t{S::kStageColumns} * step;
  const int strips = left < S::kStageColumns
                         ? (static_cast<int>(left) + kStripColumns - 1) / kStripColumns
                         : kStrips;
  const int own_end = kOwn * (part + 1), end = own_end < strips ? own_end : strips;
#pragma unroll 1
  for (int strip = kOwn * part; strip < end; ++strip) {
    uint32_t a[S::kF][2][4];
    generator.template make<kRun>(p.keys, p.first_block,
                                  static_cast<uint32_t>(kStrips * step + strip), lane, a);
    const char* chunk = stage + strip / 2 * (S::kBatch * kChunkBytes);
    // The smallest terms of the strip first.
#pragma unroll 1
    for (int term = p.terms - 1; term >= 0; --term) {
      const char* of_term = chunk + term * S::kTermBytes;
      if constexpr (S::kGroups) {
        device::multiply_group<S::kN>(sums[0], a[0], of_term, 16 * 4 * (strip % 2),
                                      kOperand == Operand::kHalf);
      } else {
        const char* from = of_term + staged_byte(lane / 4, 4 * (strip % 2) + lane % 4);
        multiply_strip<S, kOperand>(from, a, sums);
      }
    }
  }
}

// Writes staged sums [parts][batch][rows] to a layer. Neighbouring lanes write neighbouring rows,
// which are neighbours in memory. Warps that share rows divide the batch.
template <class S, class Out, class Round>
DFA_DEVICE void write_sums(const float* staged, int batch, int begin, int end, int64_t size,
                           Out* out, int part, int lane, const Round& round) {
  constexpr int kTogether = 32 / S::kWarpRows;  // error rows written at once
  const int row = lane % S::kWarpRows;
  if (row < begin || row >= end) return;
  constexpr int kStep = kTogether * S::kParts;
#pragma unroll 4
  for (int m = lane / S::kWarpRows + kTogether * part; m < batch; m += kStep) {
    const float* from = staged + m * S::kSumStride + row;
    float sum = *from;
#pragma unroll
    for (int i = 1; i < S::kParts; ++i) sum += from[i * S::kSumFloats];
    device::store_streaming(out + m * size + row, round(sum));
  }
}

template <class S>
DFA_DEVICE void write_layer(const FusedParameters& p, const Layer& layer, uint64_t row,
                            uint64_t end, int64_t error_row, int batch, const float* staged,
                            int part, int lane) {
  const uint64_t first = layer.row_offset > row ? layer.row_offset : row;
  const uint64_t last = layer.end() < end ? layer.end() : end;
  const int begin_row = static_cast<int>(first - row), end_row = static_cast<int>(last - row);
  // Of the warp's row 0, which may lie before the layer's first.
  const int64_t offset = error_row * layer.size + static_cast<int64_t>(row - layer.row_offset);
  const float scale = static_cast<float>(layer.scale);
  const auto write = [&](auto* none, const auto& round) {
    auto* out = static_cast<decltype(none)>(layer.out) + offset;
    write_sums<S>(staged, batch, begin_row, end_row, layer.size, out, part, lane, round);
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

// Waits for the warps that share this warp's rows.
template <class S>
DFA_DEVICE void sync_parts() {
  if constexpr (S::kParts == 1) {
    device::sync_warp();
  } else {
    device::sync_block();
  }
}

// Writes the sums of a warp's rows, [row, end), to all layers that have some of them.
template <class S>
DFA_DEVICE void write_layers(const FusedParameters& p, uint64_t row, uint64_t end,
                             int64_t error_row, float* staged, int part, int lane,
                             const float (&sums)[S::kF][S::kN][4]) {
  float* const own = staged + part * S::kSumFloats;
  const int layers = p.table.layers_before(end);
#pragma unroll 1
  for (int first = 0; first < S::kN; first += S::kStagedN) {
    const int64_t from = error_row + kFragmentBatch * first;
    if (from >= p.batch) break;
    sync_parts<S>();
#pragma unroll
    for (int n = 0; n < S::kN; ++n) {
      if (n < first || n >= first + S::kStagedN) continue;
#pragma unroll
      for (int f = 0; f < S::kF; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = kFragmentBatch * (n % S::kStagedN) + sum_batch(lane, i);
          own[m * S::kSumStride + kFragmentRows * f + sum_row(lane, i)] = sums[f][n][i];
        }
      }
    }
    sync_parts<S>();
    const int64_t left = p.batch - from;
    constexpr int kMost = kFragmentBatch * S::kStagedN;
    const int batch = left < kMost ? static_cast<int>(left) : kMost;
    for (int top = layers; top > 0; top -= 32) {
      if (p.table.reach(top - 1) <= row) break;
      const int mine = top - 1 - lane;
      const bool overlaps = mine >= 0 && p.table.layer_end(mine) > row;
      for (uint32_t left_over = device::ballot(overlaps); left_over != 0;
           left_over &= left_over - 1) {
        const Layer layer = p.table.layer(top - 1 - device::lowest_bit(left_over));
        write_layer<S>(p, layer, row, end, from, batch, staged, part, lane);
      }
    }
  }
}

// Tensor cores cut sums off where fp32 arithmetic rounds, so the errors of many additions add up.
// Exact sums therefore add up the sums of single steps, with rounding.
template <class S>
DFA_DEVICE void add_sums(const float (&one)[S::kF][S::kN][4], float (&sums)[S::kF][S::kN][4]) {
#pragma unroll
  for (int f = 0; f < S::kF; ++f) {
#pragma unroll
    for (int n = 0; n < S::kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[f][n][i] += one[f][n][i];
    }
  }
}

template <class S, Distribution kDistribution, Operand kOperand>
DFA_KERNEL(S::kThreads, S::kBlocks)
fused(DFA_ARGUMENT FusedParameters p) {
  if constexpr (S::kGroups && !device::kHasWarpgroups) {
    device::trap();
    return;
  }
  const int lane = device::thread() % 32, warp = device::thread() / 32;
  const int part = warp % S::kParts, of_rows = warp / S::kParts;
  const int stage_bytes = p.terms * S::kTermBytes;
  float* staged = reinterpret_cast<float*>(device::shared() + kStages * stage_bytes) +
                  of_rows * S::kParts * S::kSumFloats;
  char* const table = device::shared() + kStages * stage_bytes + S::kSumBytes;
  if constexpr (kDistribution == Distribution::kNormal) {
    Levels::make(table, device::thread(), S::kThreads);
  }

  // One stage is filled while the other is multiplied. An error that fits both stays there until
  // the next tile of the batch.
  const bool fits = p.steps <= kStages;
  ErrorPieces<S> pieces;
  int stage = 0;  // offset in bytes of the one being multiplied
  bool loading = false, fresh = true;
  int64_t item = device::block();
  if (item < p.items) {
    pieces.start(p, item / p.row_tiles);
    pieces.copy(p, 0, device::shared());
    loading = true;
  }
  for (; item < p.items; item += device::blocks()) {
    const int64_t error_tile = item / p.row_tiles, next = item + device::blocks();
    const int64_t next_error_tile = next / p.row_tiles;
    const bool stays = fits && next_error_tile == error_tile;
    const RowTile tile = p.table.tile(item % p.row_tiles, S::kRows);
    const uint64_t row = tile.row + static_cast<uint64_t>(of_rows * S::kWarpRows);
    Generator<kDistribution, kOperand, S::kF> generator;
    generator.start(p.keys, row, lane, table);
    float sums[S::kF][S::kN][4] = {};
#pragma unroll 1
    for (int32_t step = 0; step < p.steps; ++step) {
      const bool last = step + 1 == p.steps;
      const bool load = last ? next < p.items && !stays : fresh || !fits;
      if (loading || load) {
        device::wait_copies();
        if constexpr (S::kGroups) device::show_copies();
        device::sync_block();
      }
      if (load) {
        if (last) pieces.start(p, next_error_tile);
        pieces.copy(p, last ? 0 : step + 1, device::shared() + (stage_bytes - stage));
      }
      loading = load;
      const char* const staged_error = device::shared() + stage;
      if constexpr (kOperand == Operand::kExact) {
        float one[S::kF][S::kN][4] = {};
        multiply_step<S>(p, generator, step, staged_error, part, lane, one);
        add_sums<S>(one, sums);
      } else {
        multiply_step<S>(p, generator, step, staged_error, part, lane, sums);
      }
      if (load || p.steps > 1) stage = stage_bytes - stage;
    }
    fresh = !stays;
    const uint64_t tile_end = tile.row + static_cast<uint64_t>(tile.rows);
    const uint64_t warp_end = row + S::kWarpRows;
    const uint64_t end = warp_end < tile_end ? warp_end : tile_end;
    if (row < end) write_layers<S>(p, row, end, error_tile * S::kBatch, staged, part, lane, sums);
  }
}

}  // namespace dfa
