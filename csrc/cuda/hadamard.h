// Walsh-Hadamard transforms of blocks of 1024 numbers, the definition's additions in its order. A
// half of a warp makes one; each lane has 64 of the numbers in registers, in one of two layouts:
//
//   rows      lane j: numbers 64 j .. 64 j + 63, at index i number 64 j + i
//   columns   lane j: numbers 64 r + 4 j + s for r < 16 and s < 4, at index 4 r + s
//
// Stages h = 1 .. 32 of a transform combine numbers of a lane in the first, stages 64 .. 512 in the
// second. In both, numbers lie in pieces of 4. So a transform goes once through shared memory, in
// wide accesses, and its result is written in wide stores.
#pragma once

#include <type_traits>

#include "../odd.h"
#include "../projection.h"
#include "generator.h"

namespace dfa {

constexpr int kLanes = 16;                     // of a half warp
constexpr int kOwn = kHadamardBlock / kLanes;  // numbers of a lane
constexpr int kPiece = 4;                      // numbers that lie together
constexpr int kPieceRows = kOwn / kPiece;      // pieces of a lane

DFA_DEVICE int half_lane() { return device::thread() % kLanes; }
DFA_DEVICE int half() { return device::thread() / kLanes; }  // in the block of threads

template <class Real>
struct alignas(16) Piece {
  Real number[kPiece];

  DFA_DEVICE static Piece of(const Real* v) {
    Piece piece;
#pragma unroll
    for (int s = 0; s < kPiece; ++s) piece.number[s] = v[s];
    return piece;
  }
};

// A block of numbers in shared memory, in natural order. Between rows of 64 there is a gap, so that
// neighbouring lanes' pieces are in different banks in both layouts.
template <class Real>
struct Square {
  static constexpr int kRowBytes = kOwn * static_cast<int>(sizeof(Real)) + 16;
  static constexpr int kBytes = kLanes * kRowBytes + 64;

  char* data;

  DFA_DEVICE explicit Square(int index) : data(device::shared() + index * kBytes) {}

  DFA_DEVICE Real& at(int k) const {
    const int byte = k / kOwn * kRowBytes + k % kOwn * static_cast<int>(sizeof(Real));
    return *reinterpret_cast<Real*>(data + byte);
  }
  DFA_DEVICE Piece<Real>& piece(int k) const { return reinterpret_cast<Piece<Real>&>(at(k)); }

  // Number kLanes * i + j, of lane j: neighbouring lanes have neighbouring numbers.
  DFA_DEVICE Real& spread(int i) const {
    constexpr int kInRow = kOwn / kLanes;
    const int place = i % kInRow * kLanes + half_lane();
    return reinterpret_cast<Real*>(data + i / kInRow * kRowBytes)[place];
  }

  // A lane's piece i.
  DFA_DEVICE Piece<Real>& in_rows(int i) const {
    return reinterpret_cast<Piece<Real>*>(data + half_lane() * kRowBytes)[i];
  }
  DFA_DEVICE Piece<Real>& in_columns(int i) const {
    return reinterpret_cast<Piece<Real>*>(data + i * kRowBytes)[half_lane()];
  }

  DFA_DEVICE void load_rows(Real (&v)[kOwn]) const {
#pragma unroll
    for (int i = 0; i < kPieceRows; ++i) unpack(in_rows(i), v + kPiece * i);
  }
  DFA_DEVICE void load_columns(Real (&v)[kOwn]) const {
#pragma unroll
    for (int i = 0; i < kPieceRows; ++i) unpack(in_columns(i), v + kPiece * i);
  }
  DFA_DEVICE void store_rows(const Real (&v)[kOwn]) const {
#pragma unroll
    for (int i = 0; i < kPieceRows; ++i) in_rows(i) = Piece<Real>::of(v + kPiece * i);
  }
  DFA_DEVICE void store_columns(const Real (&v)[kOwn]) const {
#pragma unroll
    for (int i = 0; i < kPieceRows; ++i) in_columns(i) = Piece<Real>::of(v + kPiece * i);
  }

 private:
  DFA_DEVICE static void unpack(const Piece<Real>& piece, Real* v) {
    const Piece<Real> copy = piece;
#pragma unroll
    for (int s = 0; s < kPiece; ++s) v[s] = copy.number[s];
  }
};

// The stages in which numbers at a distance of kFirst, 2 kFirst .. kOwn / 2 in a lane are combined.
template <int kFirst, int kEnd, class Real>
DFA_DEVICE void butterflies(Real (&v)[kOwn]) {
#pragma unroll
  for (int h = kFirst; h < kEnd; h *= 2) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (i & h) continue;
      const Real a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
}

// From rows to columns. The square is free afterwards.
template <class Real>
DFA_DEVICE void transform(Real (&v)[kOwn], const Square<Real>& square) {
  butterflies<1, kOwn>(v);
  square.store_rows(v);
  device::sync_warp();
  square.load_columns(v);
  device::sync_warp();
  butterflies<kPiece, kOwn>(v);
}

// From columns to rows.
template <class Real>
DFA_DEVICE void turn(Real (&v)[kOwn], const Square<Real>& square) {
  square.store_columns(v);
  device::sync_warp();
  square.load_rows(v);
  device::sync_warp();
}

// Sign bits: those of numbers 64 j .. 64 j + 63 of a block, of the bits that one Philox block of
// rademacher entries holds.
struct Signs {
  uint32_t word[2];

  // Bit 31 is the sign of number i.
  DFA_DEVICE uint32_t at(int i) const {
    const int c = i % 32;
    return word[i / 32] << (31 - (c / 2 + 16 * (c % 2)));
  }
};

constexpr int kGroups = 8;  // Philox blocks of a diagonal

// D_domain(B, b), a Philox block of it: B is 0 in domains 1 and 2.
DFA_DEVICE Words4 sign_block(const RoundKeys& keys, uint32_t domain, uint64_t output,
                             uint32_t input, int group) {
  return rounds_from<0>(keys, kGroups * input + static_cast<uint32_t>(group), domain, lower(output),
                        upper(output));
}

// The signs of a lane's numbers in rows.
DFA_DEVICE Signs signs_of(const RoundKeys& keys, uint32_t domain, uint64_t output, uint32_t input) {
  const Words4 block = sign_block(keys, domain, output, input, half_lane() / 2);
  const bool odd = half_lane() % 2 != 0;
  return {{odd ? block.word[2] : block.word[0], odd ? block.word[3] : block.word[1]}};
}

// Changes the sign if bit 31 of `sign` is set.
DFA_DEVICE float flipped(float value, uint32_t sign) {
  return device::as_float(device::as_bits(value) ^ (sign & 0x80000000u));
}
DFA_DEVICE double flipped(double value, uint32_t sign) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits ^= static_cast<uint64_t>(sign & 0x80000000u) << 32;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

template <class Real>
DFA_DEVICE void flip(Real (&v)[kOwn], const Signs& signs) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) v[i] = flipped(v[i], signs.at(i));
}

// fwht(D2 fwht(D1 v)), from rows to columns.
template <class Real>
DFA_DEVICE void transform_input(Real (&v)[kOwn], const Square<Real>& square, const RoundKeys& keys,
                                uint32_t input) {
  flip(v, signs_of(keys, 1, 0, input));
  transform(v, square);
  turn(v, square);
  flip(v, signs_of(keys, 2, 0, input));
  transform(v, square);
}

// D1 fwht(D2 fwht(v)), its transpose, from rows to rows.
template <class Real>
DFA_DEVICE void transform_back(Real (&v)[kOwn], const Square<Real>& square, const RoundKeys& keys,
                               uint32_t input) {
  transform(v, square);
  turn(v, square);
  flip(v, signs_of(keys, 2, 0, input));
  transform(v, square);
  turn(v, square);
  flip(v, signs_of(keys, 1, 0, input));
}

// --- numbers in memory ---

// A type of numbers as a constant.
template <Type kConstant>
struct Kind {
  static constexpr Type kType = kConstant;
};

// Calls use(the Kind of a type).
template <class Use>
DFA_DEVICE void for_type(Type type, const Use& use) {
  switch (type) {
    case Type::kFloat32:
      return use(Kind<Type::kFloat32>());
    case Type::kBFloat16:
      return use(Kind<Type::kBFloat16>());
    case Type::kFloat16:
      return use(Kind<Type::kFloat16>());
    case Type::kFloat64:
      return use(Kind<Type::kFloat64>());
  }
}

template <Type kType>
using Stored = std::conditional_t<kType == Type::kFloat64, double,
                                  std::conditional_t<kType == Type::kFloat32, float, uint16_t>>;

template <class Real, Type kType>
DFA_DEVICE Real widened(Stored<kType> value) {
  if constexpr (kType == Type::kBFloat16) return Real{bfloat16_value(value)};
  if constexpr (kType == Type::kFloat16) return Real{device::half_value(value)};
  return static_cast<Real>(value);
}

template <Type kType>
DFA_DEVICE uint32_t packed(float low, float high) {
  return kType == Type::kBFloat16 ? device::pack_bf16(low, high) : device::pack_half(low, high);
}

// A 16-bit type is rounded to once.
DFA_DEVICE float before_packing(float value) { return value; }
DFA_DEVICE float before_packing(double value) { return to_odd(value); }

template <Type kType, class Real>
DFA_DEVICE Stored<kType> narrowed(Real value) {
  if constexpr (type_bytes(kType) == 2) {
    return static_cast<uint16_t>(packed<kType>(before_packing(value), 0.0f));
  } else {
    return static_cast<Stored<kType>>(value);
  }
}

// The numbers of a piece times a factor.
template <class Real>
DFA_DEVICE Piece<Real> scaled(const Real* numbers, Real factor) {
  Piece<Real> piece;
#pragma unroll
  for (int s = 0; s < kPiece; ++s) {
    piece.number[s] = device::rounded_product(numbers[s], factor);
  }
  return piece;
}

// Writes a piece to an address that is a multiple of its size, or of 16.
template <Type kType, class Real>
DFA_DEVICE void store_piece(Stored<kType>* to, const Piece<Real>& piece) {
  const Real(&x)[kPiece] = piece.number;
  if constexpr (kType == Type::kFloat32) {
    uint32_t bits[kPiece];
#pragma unroll
    for (int s = 0; s < kPiece; ++s) bits[s] = device::as_bits(static_cast<float>(x[s]));
    device::store16(to, {bits[0], bits[1], bits[2], bits[3]});
  } else if constexpr (kType == Type::kFloat64) {
#pragma unroll
    for (int s = 0; s < kPiece; s += 2) {
      const double pair[] = {static_cast<double>(x[s]), static_cast<double>(x[s + 1])};
      uint64_t bits[2];
      std::memcpy(bits, pair, sizeof bits);
      device::store16(to + s, {lower(bits[0]), upper(bits[0]), lower(bits[1]), upper(bits[1])});
    }
  } else {
    const uint32_t low = packed<kType>(before_packing(x[0]), before_packing(x[1]));
    const uint32_t high = packed<kType>(before_packing(x[2]), before_packing(x[3]));
    device::store_streaming(reinterpret_cast<unsigned long long*>(to),
                            static_cast<unsigned long long>(high) << 32 | low);
  }
}

}  // namespace dfa
