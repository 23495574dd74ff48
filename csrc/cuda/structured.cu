// Structured feedback: the projection, its transpose and the matrix, by the transforms of
// hadamard.h. U is made of blocks of 1024 x 1024; see dfa_kernels/hadamard.py.
//
// If the error lies in one block of columns, `walk` does all in one launch, but for the upload of a
// long table: a block of threads
// transforms a row of the error and makes a chunk of the output blocks from it.
//
// Otherwise `gather` adds up transformed source blocks with the signs of their targets: a block of
// threads takes one row of the error and kTargets targets. Sources are input blocks and targets
// output blocks; of the transpose it is the other way round. Where one row has more targets than
// that, `inputs` transforms its sources once, into a workspace of at most Forced's
// transformed_bytes, or of one row of the error.
#include <algorithm>

#include "../output_blocks.h"
#include "hadamard.h"
#include "schedule.h"

namespace dfa {
namespace {

constexpr int kThreads = 128;
constexpr int kHalves = kThreads / kLanes;
constexpr int64_t kBlock = kHadamardBlock;

// --- the error and the signals ---

struct Parameters {
  StridedMatrix error;  // of the transpose, its result
  int64_t head;         // columns of the first input block that lie before the error
  uint32_t first_input;
  int32_t inputs;  // input blocks, at least 1
  int64_t outputs;
  Type signal_type;
  const void* transformed;  // [rows of this pass][inputs][1024], or null
  int64_t first_row, rows;  // of this pass
  int64_t chunks;           // of output blocks, in `walk`
  int32_t together;         // rows of the error that a block of threads takes there
  RoundKeys keys;
  LayerTable table;
};
static_assert(sizeof(Parameters) <= 4096, "the limit of kernel arguments on every GPU");

// The layers that read rows of a block.
struct Readers {
  int first, end;  // all are among these, and few others

  DFA_DEVICE void find(const LayerTable& table, uint64_t row) {
    first = table.layers_past(row);
    end = table.layers_before(row + kBlock);
  }

  // The same for a later row, from where it was.
  DFA_DEVICE void advance(const LayerTable& table, uint64_t row) {
    while (first < table.layers && table.reach(first) <= row) ++first;
    while (end < table.layers && table.layer_row(end) < row + kBlock) ++end;
  }

  // Calls use(whether there is one for this half warp, layer) in the order of the table, for all
  // lanes of the warp together.
  template <class Use>
  DFA_DEVICE void for_each(const LayerTable& table, uint64_t row, const Use& use) const {
#pragma unroll 1
    for (int i = first; device::ballot(i < end) != 0; i += kLanes) {
      const int mine = i + half_lane();
      const uint32_t found = device::ballot(mine < end && table.layer_end(mine) > row);
      uint32_t left = device::thread() % 32 < kLanes ? found & 0xffffu : found >> kLanes;
#pragma unroll 1
      for (; device::ballot(left != 0) != 0; left &= left - 1) {
        const int layer = left == 0 ? 0 : i + device::lowest_bit(left);
        use(left != 0, table.layer(layer));
      }
    }
  }
};

// The rows [begin, end) of a block that are a layer's.
struct Overlap {
  int begin, end;

  DFA_DEVICE Overlap(const Layer& layer, uint64_t row) {
    begin = layer.row_offset > row ? static_cast<int>(layer.row_offset - row) : 0;
    const uint64_t rows = layer.end() - row;
    end = rows < kBlock ? static_cast<int>(rows) : kHadamardBlock;
  }
};

// The place in a layer's signal of row 0 of a block, which may lie before the signal.
DFA_DEVICE int64_t signal_place(const Layer& layer, uint64_t row, int64_t m) {
  return static_cast<int64_t>(static_cast<uint64_t>(m * layer.size) + (row - layer.row_offset));
}

// Writes a block of sums in columns, scaled, to every layer that reads its rows: a whole block from
// registers, a part of one by way of shared memory.
template <class Real>
DFA_DEVICE void write_signals(const Parameters& p, const Readers& readers, uint64_t row, int64_t m,
                              bool valid, const Real (&v)[kOwn], const Square<Real>& square) {
  bool staged = false;
  const auto bytes = static_cast<uint64_t>(type_bytes(p.signal_type));
  readers.for_each(p.table, row, [&](bool is_there, const Layer& layer) {
    is_there = is_there && valid;
    const Overlap rows(layer, row);
    const Real factor = static_cast<Real>(layer.scale);
    // Of row 0 of the block, which may lie before the layer's first.
    const uint64_t address = reinterpret_cast<uint64_t>(layer.out) +
                             static_cast<uint64_t>(signal_place(layer, row, m)) * bytes;
    const bool aligned = address % (bytes == 2 ? 8 : 16) == 0;
    const bool whole = aligned && rows.end - rows.begin == kHadamardBlock;
    if (!staged && device::ballot(is_there && !whole) != 0) {
      square.store_columns(v);
      device::sync_warp();
      staged = true;
    }
    if (!is_there) return;
    for_type(p.signal_type, [&](auto kind) {
      constexpr Type kType = decltype(kind)::kType;
      auto* const out = reinterpret_cast<Stored<kType>*>(address);
      if (whole) {
        auto* const to = out + kPiece * half_lane();
#pragma unroll
        for (int i = 0; i < kPieceRows; ++i) {
          store_piece<kType>(to + kOwn * i, scaled(v + kPiece * i, factor));
        }
        return;
      }
      const int lane = half_lane();
      if (aligned && (rows.begin | rows.end) % kPiece == 0) {
#pragma unroll 2
        for (int k = kPiece * lane; k < rows.end; k += kPiece * kLanes) {
          if (k >= rows.begin) {
            store_piece<kType>(out + k, scaled(square.piece(k).number, factor));
          }
        }
        return;
      }
#pragma unroll 4
      for (int k = lane; k < rows.end; k += kLanes) {
        const Real x = device::rounded_product(square.at(k), factor);
        if (k >= rows.begin) device::store_streaming(out + k, narrowed<kType>(x));
      }
    });
  });
  if (staged) device::sync_warp();
}

// The sources of a projection: columns of the error.
template <class Real>
DFA_DEVICE void read_error(const Parameters& p, int64_t m, int64_t input,
                           const Square<Real>& square) {
  const StridedMatrix& error = p.error;
  const int64_t first = input * kBlock - p.head;
  const bool whole = first >= 0 && first + kBlock <= error.columns && error.column_stride == 1;
  for_type(error.type, [&](auto kind) {
    constexpr Type kType = decltype(kind)::kType;
    const auto* const from = static_cast<const Stored<kType>*>(error.data) + m * error.batch_stride;
    if (whole) {
      const auto* const own = from + (first + half_lane());
#pragma unroll
      for (int i = 0; i < kOwn; ++i) square.spread(i) = widened<Real, kType>(own[kLanes * i]);
    } else {
#pragma unroll 2
      for (int k = half_lane(); k < kHadamardBlock; k += kLanes) {
        const int64_t c = first + k;
        const bool inside = c >= 0 && c < error.columns;
        square.at(k) = inside ? widened<Real, kType>(from[c * error.column_stride]) : Real{0};
      }
    }
  });
  device::sync_warp();
}

// The transformed source, in columns.
template <class Real>
DFA_DEVICE void make_input(const Parameters& p, int64_t m, int64_t input,
                           const Square<Real>& square, Real (&v)[kOwn]) {
  read_error(p, m, input, square);
  square.load_rows(v);
  device::sync_warp();
  transform_input(v, square, p.keys, p.first_input + static_cast<uint32_t>(input));
}

// The sources of its transpose: the layers' signals, scaled and added up in the table's order.
template <class Real>
DFA_DEVICE void read_signals(const Parameters& p, int64_t m, uint64_t row,
                             const Square<Real>& square) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) square.spread(i) = Real{0};
  Readers readers;
  readers.find(p.table, row);
  readers.for_each(p.table, row, [&](bool is_there, const Layer& layer) {
    if (!is_there) return;
    const Overlap rows(layer, row);
    const Real factor = static_cast<Real>(layer.scale);
    for_type(p.signal_type, [&](auto kind) {
      constexpr Type kType = decltype(kind)::kType;
      const auto* const from =
          static_cast<const Stored<kType>*>(layer.out) + signal_place(layer, row, m);
#pragma unroll 4
      for (int k = half_lane(); k < rows.end; k += kLanes) {
        if (k < rows.begin) continue;
        square.at(k) += device::rounded_product(factor, widened<Real, kType>(from[k]));
      }
    });
  });
  device::sync_warp();
}

// --- one input block ---

// A block of threads takes p.together rows of the error, each with as many half warps, and a chunk
// of the output blocks. One half warp transforms the row; then all make output blocks from it.
template <class Real>
DFA_KERNEL(kThreads, sizeof(Real) == 8 ? 2 : 4)
walk(DFA_ARGUMENT Parameters p) {
  const int share = kHalves / p.together, member = half() % share;  // half warps of a row
  const Square<Real> square(half()), source(kHalves + half() / share);
  const int64_t row_of_error =
      p.first_row + device::block() / p.chunks * p.together + half() / share;
  const int64_t last_row = p.first_row + p.rows - 1;
  const int64_t m = row_of_error < last_row ? row_of_error : last_row;
  if (half() / 2 * 2 % share == 0) {  // both halves of a warp, or none
    Real v[kOwn];
    make_input(p, m, 0, square, v);
    if (member == 0) source.store_columns(v);
  }
  device::sync_block();
  const int64_t chunk = device::block() % p.chunks;
  const int64_t first = chunk * p.outputs / p.chunks;
  const int count = static_cast<int>((chunk + 1) * p.outputs / p.chunks - first);
  Readers readers;
#pragma unroll 1
  for (int step = 0; step < count; step += share) {
    const int mine = step + member, block = mine < count ? mine : count - 1;
    const uint64_t row = p.table.tile(first + block, kHadamardBlock).row;
    step == 0 ? readers.find(p.table, row) : readers.advance(p.table, row);
    const Signs signs = signs_of(p.keys, 3, row / kBlock, p.first_input);
    Real v[kOwn];
    source.load_rows(v);
    flip(v, signs);
    transform(v, square);
    write_signals(p, readers, row, m, row_of_error <= last_row && mine < count, v, square);
  }
}

// --- several sources ---

template <class Real>
constexpr int kTargets = sizeof(Real) == 8 ? 2 : 4;

template <class Real>
constexpr int kGatherBytes = kHalves * Square<Real>::kBytes + kHalves * kTargets<Real> * 128;

template <class Real>
DFA_KERNEL(kThreads, sizeof(Real) == 8 ? 2 : 3)
inputs(DFA_ARGUMENT Parameters p) {
  const Square<Real> square(half());
  const int64_t count = p.rows * p.inputs;
  // Both halves of a warp come as often.
  for (int64_t first = int64_t{kHalves} * device::block() + device::thread() / 32 * 2;
       first < count; first += int64_t{kHalves} * device::blocks()) {
    const int64_t mine = first + half() % 2, i = mine < count ? mine : count - 1;
    Real v[kOwn];
    make_input(p, p.first_row + i / p.inputs, i % p.inputs, square, v);
    auto* const to = reinterpret_cast<Piece<Real>*>(
        static_cast<Real*>(const_cast<void*>(p.transformed)) + i * kBlock);
#pragma unroll
    for (int piece = 0; piece < kPieceRows; ++piece) {
      to[kLanes * piece + half_lane()] = Piece<Real>::of(v + kPiece * piece);
    }
  }
}

template <class Real, bool kTranspose>
DFA_DEVICE void make_source(const Parameters& p, int64_t row, int64_t source,
                            const Square<Real>& square) {
  const int64_t m = p.first_row + row;
  if constexpr (kTranspose) {
    Real v[kOwn];
    read_signals(p, m, p.table.tile(source, kHadamardBlock).row, square);
    square.load_rows(v);
    device::sync_warp();
    transform(v, square);
    square.store_columns(v);
  } else if (p.transformed != nullptr) {
    const auto* const from = reinterpret_cast<const Piece<Real>*>(
        static_cast<const Real*>(p.transformed) + (row * p.inputs + source) * kBlock);
#pragma unroll
    for (int i = 0; i < kPieceRows; ++i) square.in_columns(i) = from[kLanes * i + half_lane()];
  } else {
    Real v[kOwn];
    make_input(p, m, source, square, v);
    square.store_columns(v);
  }
}

// A target's sums in rows, to where they belong.
template <class Real, bool kTranspose>
DFA_DEVICE void finish(const Parameters& p, int64_t row, int64_t target, bool valid,
                       Real (&v)[kOwn], const Square<Real>& square) {
  const int64_t m = p.first_row + row;
  if constexpr (kTranspose) {
    transform_back(v, square, p.keys, p.first_input + static_cast<uint32_t>(target));
    square.store_rows(v);
    device::sync_warp();
    if (!valid) return;
    const int64_t first = target * kBlock - p.head;
    for_type(p.error.type, [&](auto kind) {
      constexpr Type kType = decltype(kind)::kType;
      auto* const to = static_cast<Stored<kType>*>(const_cast<void*>(p.error.data)) +
                       m * p.error.batch_stride + first;
#pragma unroll 2
      for (int k = half_lane(); k < kHadamardBlock; k += kLanes) {
        if (first + k < 0 || first + k >= p.error.columns) continue;
        to[k] = narrowed<kType>(square.at(k));
      }
    });
  } else {
    const uint64_t row_of_u = p.table.tile(target, kHadamardBlock).row;
    Readers readers;
    readers.find(p.table, row_of_u);
    transform(v, square);
    write_signals(p, readers, row_of_u, m, valid, v, square);
  }
}

template <class Real, bool kTranspose>
DFA_KERNEL(kThreads, sizeof(Real) == 8 ? 2 : 3)
gather(DFA_ARGUMENT Parameters p) {
  constexpr int kMost = kTargets<Real>;
  const int t = device::thread();
  const Square<Real> square(half());
  auto* const words =  // [source][target][32]
      reinterpret_cast<uint32_t*>(device::shared() + kHalves * Square<Real>::kBytes);
  const int64_t sources = kTranspose ? p.outputs : p.inputs;
  const int64_t targets = kTranspose ? p.inputs : p.outputs;
  const int64_t groups = (targets + kMost - 1) / kMost;
  for (int64_t item = device::block(); item < p.rows * groups; item += device::blocks()) {
    const int64_t row = item / groups, target = item % groups * kMost;
    const int here = targets - target < kMost ? static_cast<int>(targets - target) : kMost;
    // A thread's numbers are 4 t .. 4 t + 3 and 512 further on.
    Real sums[kMost][2 * kPiece] = {};
#pragma unroll 1
    for (int64_t source = 0; source < sources; source += kHalves) {
      const int64_t left = sources - source;
      const int count = left < kHalves ? static_cast<int>(left) : kHalves;
      if (half() / 2 * 2 < count) {
        const int own = half() < count ? half() : count - 1;
        make_source<Real, kTranspose>(p, row, source + own, square);
      }
#pragma unroll 1
      for (int i = t; i < count * here * kGroups; i += kThreads) {
        const int group = i % kGroups, g = i / kGroups % here, j = i / kGroups / here;
        const int64_t from = source + j, to = target + g;
        const int64_t output = kTranspose ? from : to, input = kTranspose ? to : from;
        const Words4 block =
            sign_block(p.keys, 3, p.table.tile(output, kHadamardBlock).row / kBlock,
                       p.first_input + static_cast<uint32_t>(input), group);
        *reinterpret_cast<Words16*>(words + (j * kMost + g) * 32 + group * 4) = {
            block.word[0], block.word[1], block.word[2], block.word[3]};
      }
      device::sync_block();
#pragma unroll 1
      for (int j = 0; j < count; ++j) {
        const Square<Real> of(j);
        const Piece<Real> piece[] = {of.piece(kPiece * t), of.piece(kPiece * t + 512)};
        const uint32_t* word = words + j * kMost * 32 + t / 8;
#pragma unroll
        for (int g = 0; g < kMost; ++g) {
          if (g >= here) break;
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            // Numbers 4 q .. 4 q + 3 of a word's 32 are bits 2 q, 2 q + 16, 2 q + 1, 2 q + 17.
            const uint32_t signs = word[g * 32 + side * 16] << (14 - 2 * (t % 8));
            const int shift[] = {17, 1, 16, 0};
#pragma unroll
            for (int s = 0; s < kPiece; ++s) {
              sums[g][kPiece * side + s] += flipped(piece[side].number[s], signs << shift[s]);
            }
          }
        }
      }
      device::sync_block();
    }
#pragma unroll
    for (int g = 0; g < kMost; ++g) {
      const Square<Real> of(g);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        Piece<Real> piece;
#pragma unroll
        for (int s = 0; s < kPiece; ++s) piece.number[s] = sums[g][kPiece * side + s];
        of.piece(kPiece * t + 512 * side) = piece;
      }
    }
    device::sync_block();
    if (half() / 2 * 2 < here) {
      const int own = half() < here ? half() : here - 1;
      Real v[kOwn];
      square.load_rows(v);
      device::sync_warp();
      finish<Real, kTranspose>(p, row, target + own, half() < here, v, square);
    }
    device::sync_block();
  }
}

// --- the matrix ---

struct MatrixParameters {
  uint64_t row_offset;
  int64_t rows, columns, head;
  uint32_t first_input;
  int64_t inputs;
  Type type;
  RoundKeys keys;
  void* out;
};

// The signs of row r of H, numbers 64 j .. 64 j + 63: number k's is the parity of r & k.
DFA_DEVICE Signs signs_of_row(uint32_t r) {
  uint32_t word = r & 1 ? 0xffff0000u : 0;  // of the first 32 numbers
  if (r & 2) word ^= 0xaaaaaaaau;
  if (r & 4) word ^= 0xccccccccu;
  if (r & 8) word ^= 0xf0f0f0f0u;
  if (r & 16) word ^= 0xff00ff00u;
  uint32_t high = r >> 6 & static_cast<uint32_t>(half_lane());
  high ^= high >> 2;
  high ^= high >> 1;
  word ^= 0u - (high & 1);
  return {{word, word ^ (0u - (r >> 5 & 1))}};
}

// Row r of a block is that of H with the signs of D3, transformed, signed by D2, transformed, and
// signed by D1: the transpose of a unit vector. All is exact in fp32.
DFA_KERNEL(kThreads, 3) fill_structured(DFA_ARGUMENT MatrixParameters p) {
  const Square<float> square(half());
  const int64_t count = p.rows * p.inputs;
  for (int64_t first = int64_t{kHalves} * device::block() + device::thread() / 32 * 2;
       first < count; first += int64_t{kHalves} * device::blocks()) {
    const int64_t mine = first + half() % 2, i = mine < count ? mine : count - 1;
    const int64_t r = i / p.inputs, block = i % p.inputs;
    const uint64_t row = p.row_offset + static_cast<uint64_t>(r);
    const uint32_t input = p.first_input + static_cast<uint32_t>(block);
    float v[kOwn];
    const Signs of_row = signs_of_row(static_cast<uint32_t>(row % kBlock));
    const Signs outer = signs_of(p.keys, 3, row / kBlock, input);
    const Signs signs = {{of_row.word[0] ^ outer.word[0], of_row.word[1] ^ outer.word[1]}};
#pragma unroll
    for (int k = 0; k < kOwn; ++k) v[k] = flipped(0x1p-10f, signs.at(k));
    transform_back(v, square, p.keys, input);
    square.store_rows(v);
    device::sync_warp();
    const int64_t before = block * kBlock - p.head;
    for_type(p.type, [&](auto kind) {
      constexpr Type kType = decltype(kind)::kType;
      auto* const out = static_cast<Stored<kType>*>(p.out) + r * p.columns + before;
#pragma unroll 2
      for (int k = half_lane(); k < kHadamardBlock; k += kLanes) {
        const int64_t column = before + k;
        if (column < 0 || column >= p.columns || mine >= count) continue;
        device::store_streaming(out + k, narrowed<kType>(square.at(k)));
      }
    });
    device::sync_warp();
  }
}

// --- the host's side ---

// Blocks of threads that the GPU runs at once.
template <class P>
int64_t resident(void (*kernel)(P), int shared_bytes, const Forced& forced) {
  const int64_t processors = forced.processors > 0 ? forced.processors : device_limits().processors;
  return std::max<int64_t>(1, processors * resident_blocks(kernel, kThreads, shared_bytes));
}

// Launches as many, which take the items in turn.
template <class P>
void start(void (*kernel)(P), const P& parameters, int64_t items, int shared_bytes,
           const Forced& forced, void* cuda_stream) {
  const int64_t blocks = std::min(items, resident(kernel, shared_bytes, forced));
  launch(kernel, parameters, blocks, kThreads, shared_bytes, cuda_stream);
}

// Calls use() with a null pointer to the type of sums for numbers of this one.
template <class Use>
void for_arithmetic(Type type, const Use& use) {
  if (type == Type::kFloat64) {
    use(static_cast<double*>(nullptr));
  } else {
    use(static_cast<float*>(nullptr));
  }
}

Parameters parameters_of(const Stream& stream, const StridedMatrix& error, Type signal_type,
                         const OutputBlocks& outputs, const Allocate& allocate, void* cuda_stream) {
  Parameters p{};
  p.error = error;
  p.head = stream.column_offset % kBlock;
  p.first_input = static_cast<uint32_t>(stream.column_offset / kBlock);
  p.inputs = static_cast<int32_t>(std::max<int64_t>(1, divide_up(p.head + error.columns, kBlock)));
  p.outputs = outputs.count();
  p.signal_type = signal_type;
  p.rows = error.batch;
  p.keys = RoundKeys(stream.seed);
  set_table(outputs.layers(), outputs.blocks(), allocate, cuda_stream, p.table);
  return p;
}

// In how many chunks `groups` of rows take the output blocks, `share` of these at a time. To
// transform the rows takes as long as kStart output blocks.
int64_t chunks_of(int64_t groups, int64_t outputs, int64_t share, int64_t blocks) {
  constexpr double kStart = 2.5;
  int64_t best = 1;
  double least = 0;
  for (int64_t rounds = 1; rounds <= 8; ++rounds) {
    const int64_t chunks =
        std::clamp<int64_t>(rounds * blocks / groups, 1, divide_up(outputs, share));
    const int64_t steps = divide_up(divide_up(outputs, chunks), share);
    const double cost = static_cast<double>(divide_up(groups * chunks, blocks)) *
                        (kStart + static_cast<double>(steps));
    if (rounds == 1 || cost < least) {
      best = chunks;
      least = cost;
    }
  }
  return best;
}

template <class Real>
void start_walk(Parameters& p, const Forced& forced, void* cuda_stream) {
  const auto bytes_of = [](int share) {
    return (kHalves + kHalves / share) * Square<Real>::kBytes;
  };
  int share = kHalves;
  while (share > 1 && p.outputs <= share / 2 &&
         bytes_of(share / 2) <= device_limits().shared_bytes) {
    share /= 2;
  }
  p.together = kHalves / share;
  const int bytes = bytes_of(share);
  const int64_t blocks = resident(&walk<Real>, bytes, forced);
  constexpr int64_t kPass = 1 << 30;  // so that a grid can have as many blocks
  const int64_t batch = p.rows;
  for (p.first_row = 0; p.first_row < batch; p.first_row += kPass) {
    p.rows = std::min(kPass, batch - p.first_row);
    const int64_t groups = divide_up(p.rows, p.together);
    p.chunks = chunks_of(groups, p.outputs, share, blocks);
    launch(&walk<Real>, p, groups * p.chunks, kThreads, bytes, cuda_stream);
  }
}

template <class Real>
void start_gather(Parameters& p, const Forced& forced, const Allocate& allocate,
                  void* cuda_stream) {
  const int64_t groups = divide_up(p.outputs, kTargets<Real>);
  const int64_t batch = p.error.batch;
  const int64_t row_bytes = p.inputs * kBlock * int64_t{sizeof(Real)};
  int64_t pass = batch;
  if (groups > 1) {
    pass = std::clamp<int64_t>(forced.transformed_bytes / row_bytes, 1, batch);
    p.transformed = allocate(pass * row_bytes);
  }
  for (p.first_row = 0; p.first_row < batch; p.first_row += pass) {
    p.rows = std::min(pass, batch - p.first_row);
    if (p.transformed != nullptr) {
      start(&inputs<Real>, p, divide_up(p.rows * p.inputs, kHalves), kHalves * Square<Real>::kBytes,
            forced, cuda_stream);
    }
    start(&gather<Real, false>, p, p.rows * groups, kGatherBytes<Real>, forced, cuda_stream);
  }
}

}  // namespace

void project_structured_cuda(const Stream& stream, const StridedMatrix& error,
                             const std::vector<Layer>& layers, Type out_type, const Forced& forced,
                             const Allocate& allocate, void* cuda_stream) {
  if (layers.empty() || error.batch == 0) return;
  const OutputBlocks outputs(layers);
  Parameters p = parameters_of(stream, error, out_type, outputs, allocate, cuda_stream);
  for_arithmetic(error.type, [&](auto* real) {
    using Real = std::remove_pointer_t<decltype(real)>;
    if (p.inputs == 1) {
      start_walk<Real>(p, forced, cuda_stream);
    } else {
      start_gather<Real>(p, forced, allocate, cuda_stream);
    }
  });
}

void adjoint_structured_cuda(const Stream& stream, const std::vector<Layer>& layers, Type in_type,
                             int64_t batch, int64_t columns, Type out_type, void* out,
                             const Allocate& allocate, void* cuda_stream) {
  if (batch == 0 || columns == 0) return;
  const OutputBlocks outputs(layers);
  const Parameters p = parameters_of(stream, {out, batch, columns, columns, 1, out_type}, in_type,
                                     outputs, allocate, cuda_stream);
  for_arithmetic(out_type, [&](auto* real) {
    using Real = std::remove_pointer_t<decltype(real)>;
    start(&gather<Real, true>, p, batch * divide_up(p.inputs, kTargets<Real>), kGatherBytes<Real>,
          {}, cuda_stream);
  });
}

void feedback_matrix_structured_cuda(const Stream& stream, uint64_t row_offset, int64_t rows,
                                     int64_t columns, Type type, void* out, void* cuda_stream) {
  if (rows == 0 || columns == 0) return;
  MatrixParameters p{};
  p.row_offset = row_offset;
  p.rows = rows;
  p.columns = columns;
  p.head = stream.column_offset % kBlock;
  p.first_input = static_cast<uint32_t>(stream.column_offset / kBlock);
  p.inputs = divide_up(p.head + columns, kBlock);
  p.type = type;
  p.keys = RoundKeys(stream.seed);
  p.out = out;
  start(&fill_structured, p, divide_up(rows * p.inputs, kHalves), kHalves * Square<float>::kBytes,
        {}, cuda_stream);
}

}  // namespace dfa
