// U itself. A thread makes a unit of 8 columns of row after row. The threads of a warp are side by
// side, so a row of 16-bit entries is written 512 bytes at a time.
#include <algorithm>
#include <cstring>

#include "../projection.h"
#include "generator.h"

namespace dfa {
namespace {

constexpr int kThreads = 256;

struct FillParameters {
  RoundKeys keys;
  uint64_t row_offset;
  int64_t rows, columns;
  int64_t head;   // columns of the first unit that lie before the matrix
  int64_t units;  // in a row
  uint64_t first_unit;
  int64_t unit_groups, row_groups;
  int32_t width;  // threads side by side, a power of two
  double factor;  // of uniform entries
  void* out;
};

// The words of a unit: element i begins at word i * bytes / 4, and 16-bit elements are in pairs.
template <Type kType, Distribution kDistribution>
DFA_DEVICE void unit_words(const Words4& block, int quad, double factor, uint32_t (&words)[16]) {
  constexpr Halves halves = halves_of(kDistribution);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t pair;  // bf16 patterns
    float low, high;
    if constexpr (kDistribution == Distribution::kUniform) {
      low = uniform_value(block.word[i], halves.low);
      high = uniform_value(block.word[i], halves.high);
      if constexpr (kType != Type::kFloat64) {
        low *= static_cast<float>(factor);
        high *= static_cast<float>(factor);
      }
      pair = device::pack_bf16(low, high);
    } else {
      if constexpr (kDistribution == Distribution::kNormal) {
        pair = normal_pair(block.word[i], halves);
      } else {
        pair = ((block.word[0] << (15 - 4 * quad - i)) & 0x80008000u) | 0x3f803f80u;
      }
      low = device::as_float(pair << 16);
      high = device::as_float(pair & 0xffff0000u);
    }
    if constexpr (kType == Type::kBFloat16) {
      words[i] = pair;
    } else if constexpr (kType == Type::kFloat16) {
      words[i] = device::pack_half(low, high);
    } else if constexpr (kType == Type::kFloat32) {
      words[2 * i] = device::as_bits(low);
      words[2 * i + 1] = device::as_bits(high);
    } else {
      const double times = kDistribution == Distribution::kUniform ? factor : 1.0;
      const double wide[] = {low * times, high * times};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint64_t bits;
        std::memcpy(&bits, &wide[j], sizeof bits);
        words[4 * i + 2 * j] = lower(bits);
        words[4 * i + 2 * j + 1] = upper(bits);
      }
    }
  }
}

template <Type kType>
DFA_DEVICE void write_unit(const uint32_t (&words)[16], int64_t column, int64_t columns,
                           char* row) {
  constexpr int kBytes = static_cast<int>(type_bytes(kType));
  char* const to = row + column * kBytes;
  if (column >= 0 && column + 8 <= columns && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 2; ++i) {
      device::store16(to + 16 * i,
                      {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]});
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    if (column + c < 0 || column + c >= columns) continue;
    if constexpr (kBytes == 2) {
      reinterpret_cast<uint16_t*>(to)[c] = static_cast<uint16_t>(words[c / 2] >> (16 * (c % 2)));
    } else {
#pragma unroll
      for (int i = 0; i < kBytes / 4; ++i) {
        reinterpret_cast<uint32_t*>(to)[kBytes / 4 * c + i] = words[kBytes / 4 * c + i];
      }
    }
  }
}

template <Type kType, Distribution kDistribution>
DFA_KERNEL(kThreads, 4)
fill(DFA_ARGUMENT FillParameters p) {
  const int64_t group = device::block();
  const int64_t unit = group % p.unit_groups * p.width + device::thread() % p.width;
  if (unit >= p.units) return;
  const int64_t high = kThreads / p.width;  // rows at once
  const int64_t step = high * p.row_groups;
  const uint64_t absolute = p.first_unit + static_cast<uint64_t>(unit);
  constexpr int kUnits = facts(kDistribution).block / kUnitColumns;  // of a Philox block
  const uint32_t column_block = static_cast<uint32_t>(absolute / kUnits);
  for (int64_t r = group / p.unit_groups * high + device::thread() / p.width; r < p.rows;
       r += step) {
    const uint64_t row = p.row_offset + static_cast<uint64_t>(r);
    RowState state;
    state.set(p.keys, lower(row));
    Words4 block = join(p.keys, state, ColumnState(p.keys, column_block, upper(row)));
    if constexpr (kUnits > 1) {  // the one word of these 8 columns
      const int word = static_cast<int>(absolute % kUnits / 4);
      block.word[0] = word < 2 ? (word == 0 ? block.word[0] : block.word[1])
                               : (word == 2 ? block.word[2] : block.word[3]);
    }
    uint32_t words[16];
    unit_words<kType, kDistribution>(block, static_cast<int>(absolute % 4), p.factor, words);
    char* const out = static_cast<char*>(p.out) + r * p.columns * type_bytes(kType);
    write_unit<kType>(words, 8 * unit - p.head, p.columns, out);
  }
}

template <Type kType>
auto fill_of(Distribution distribution) -> void (*)(FillParameters) {
  return for_distribution(distribution, [](auto kind) { return &fill<kType, kind>; });
}

auto fill_of(Type type, Distribution distribution) -> void (*)(FillParameters) {
  switch (type) {
    case Type::kFloat32:
      return fill_of<Type::kFloat32>(distribution);
    case Type::kBFloat16:
      return fill_of<Type::kBFloat16>(distribution);
    case Type::kFloat16:
      return fill_of<Type::kFloat16>(distribution);
    case Type::kFloat64:
      return fill_of<Type::kFloat64>(distribution);
  }
  throw std::logic_error("dfa_kernels: unknown type");
}

}  // namespace

void feedback_matrix_cuda(const Stream& stream, uint64_t row_offset, int64_t rows, int64_t columns,
                          Type type, bool lattice, void* out, void* cuda_stream) {
  if (rows == 0 || columns == 0) return;
  FillParameters p{};
  p.keys = RoundKeys(stream.seed);
  p.row_offset = row_offset;
  p.rows = rows;
  p.columns = columns;
  p.head = stream.column_offset % kUnitColumns;
  p.first_unit = static_cast<uint64_t>(stream.column_offset / kUnitColumns);
  p.units = divide_up(p.head + columns, kUnitColumns);
  p.width = 1;
  while (p.width < kThreads && p.width < p.units) p.width *= 2;
  p.unit_groups = divide_up(p.units, p.width);
  // Enough blocks to fill the GPU several times over, each with several rows.
  const int64_t blocks = 32 * int64_t{device_limits().processors};
  const int64_t most = divide_up(rows, kThreads / p.width);
  p.row_groups = std::min(most, divide_up(blocks, p.unit_groups));
  p.factor = lattice ? 1.0 : facts(stream.distribution).factor;
  p.out = out;
  launch(fill_of(type, stream.distribution), p, p.unit_groups * p.row_groups, kThreads, 0,
         cuda_stream);
}

}  // namespace dfa
