// Multiplies a tile with the packed error, and scales the sums into the layers.
#pragma once

#include "convert.h"

namespace dfa {
namespace {

constexpr size_t kLineBytes = 64;  // a cache line

// The types of a product: of its sums, and of the elements of tile and error.
template <class S>
struct Float32Ops {
  using Acc = float;
  using Error = float;
  using Tile = float;
  static constexpr int kColumns = 1;  // in an element
  using V = typename S::F;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kMaxBatch = S::kBatchF32;
  static V zero() { return S::zero(); }
  static V tile(const Tile* p) { return S::load(p); }
  static V error(Error e) { return S::set1(e); }
  static V errors(const Error* p) { return S::load(p); }
  static V fma(V e, V u, V acc) { return S::fma(e, u, acc); }
};

template <class S>
struct Float64Ops {
  using Acc = double;
  using Error = double;
  using Tile = float;
  using V = typename S::D;
  static constexpr int kLanes = S::kLanes / 2;
  static constexpr int kMaxBatch = S::kBatchF64;
  static V zero() { return S::zero_d(); }
  static V tile(const Tile* p) { return S::load_widen(p); }
  static V error(Error e) { return S::set1(e); }
  static V errors(const Error* p) { return S::load(p); }
  static V fma(V e, V u, V acc) { return S::fma(e, u, acc); }
};

// Calls use(the batch as a constant) for 1..Most.
template <int Most, class Use>
void for_few(int batch, const Use& use) {
  if constexpr (Most > 1) {
    if (batch < Most) return for_few<Most - 1>(batch, use);
  }
  use(std::integral_constant<int, Most>());
}

// Finishes the sums of panel rows from `first` on: adds what acc has, scales, writes. Inlined, so
// that sums stay in registers.
template <class S, class Ops, int Batch, int Vectors>
[[gnu::always_inline]] inline void finish(typename Ops::V (&acc)[Batch][Vectors],
                                          const MultiplySpec& spec, int first = 0) {
  using Acc = typename Ops::Acc;
  Acc* to = static_cast<Acc*>(spec.acc) + first;
  int64_t stride = spec.acc_stride;
  if (spec.accumulate) {
#pragma GCC unroll 16
    for (int m = 0; m < Batch; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        acc[m][v] = S::plus(acc[m][v], S::load(to + m * stride + v * Ops::kLanes));
      }
    }
  }
  if (spec.out != nullptr) {
    to = static_cast<Acc*>(spec.out) + first;
    stride = spec.out_stride;
    const auto factor = S::set1(static_cast<Acc>(spec.scale));
#pragma GCC unroll 16
    for (int m = 0; m < Batch; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) acc[m][v] = S::times(acc[m][v], factor);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < Batch; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) S::store(to + m * stride + v * Ops::kLanes, acc[m][v]);
  }
}

template <class S, class Ops, int Batch>
void multiply_batch(const MultiplySpec& spec) {
  constexpr int kPanel = 2 * S::kLanes;
  constexpr int kVectors = kPanel / Ops::kLanes;
  const auto* error = static_cast<const typename Ops::Error*>(spec.error);
  const auto* tile = static_cast<const typename Ops::Tile*>(spec.tile);
  typename Ops::V acc[Batch][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < Batch; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[m][v] = Ops::zero();
  }
  for (int64_t k = 0; k < spec.depth; ++k, error += Batch, tile += kPanel) {
    decltype(Ops::tile(tile)) u[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) u[v] = Ops::tile(tile + v * Ops::kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < Batch; ++m) {
      const auto e = Ops::error(error[m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[m][v] = Ops::fma(e, u[v], acc[m][v]);
    }
  }
  finish<S, Ops>(acc, spec);
}

// The numbers of bf16 pairs as floats.
template <class S>
typename S::F low_of_pairs(typename S::I pairs) {
  return S::as_float(S::template left<16>(pairs));
}
template <class S>
typename S::F high_of_pairs(typename S::I pairs) {
  return S::as_float(S::mask(pairs, 0xffff0000u));
}

// The same of a tile of bf16 pairs, whole, and an error of floats from column spec.begin on.
template <class S, int Batch>
void multiply_kept_batch(const MultiplySpec& spec) {
  constexpr int kPanel = 2 * S::kLanes;
  using F = typename S::F;
  const auto* error = static_cast<const float*>(spec.error);
  const auto* tile = static_cast<const uint32_t*>(spec.tile) + spec.begin / 2 * kPanel;
  F acc[Batch][2];
#pragma GCC unroll 16
  for (int m = 0; m < Batch; ++m) acc[m][0] = acc[m][1] = S::zero();
  const auto add = [&](F u0, F u1) {
#pragma GCC unroll 16
    for (int m = 0; m < Batch; ++m) {
      const F e = S::set1(error[m]);
      acc[m][0] = S::fma(e, u0, acc[m][0]);
      acc[m][1] = S::fma(e, u1, acc[m][1]);
    }
    error += Batch;
  };
  const auto low = [&](int v) { return low_of_pairs<S>(S::load_bits(tile + v * S::kLanes)); };
  const auto high = [&](int v) { return high_of_pairs<S>(S::load_bits(tile + v * S::kLanes)); };
  int64_t left = spec.depth;
  if (left > 0 && spec.begin % 2 == 1) {
    add(high(0), high(1));
    tile += kPanel;
    --left;
  }
  for (; left > 1; left -= 2, tile += kPanel) {
    add(low(0), low(1));
    add(high(0), high(1));
  }
  if (left > 0) add(low(0), low(1));
  finish<S, Float32Ops<S>>(acc, spec);
}

template <class S>
void multiply_kept(const MultiplySpec& spec) {
  for_few<S::kBatchF32>(spec.batch, [&](auto batch) { multiply_kept_batch<S, batch>(spec); });
}

template <class S, class Ops>
void multiply(const MultiplySpec& spec) {
  for_few<Ops::kMaxBatch>(spec.batch, [&](auto batch) { multiply_batch<S, Ops, batch>(spec); });
}

// One row of U: lanes are columns. Zeros fill up the last vectors.
template <class S, class Ops, int Batch>
void dot_batch(const MultiplySpec& spec) {
  using Error = typename Ops::Error;
  using Tile = typename Ops::Tile;
  constexpr int kSums = 2;  // for each error, so that additions wait less for each other
  constexpr int kStep = kSums * Ops::kLanes;
  const auto* error = static_cast<const Error*>(spec.error);
  const auto* tile = static_cast<const Tile*>(spec.tile);
  typename Ops::V acc[Batch][kSums];
  for (auto& sums : acc) {
    for (auto& sum : sums) sum = Ops::zero();
  }
  const auto step = [&](const Error* errors, int64_t stride, const Tile* entries) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const auto u = Ops::tile(entries + i * Ops::kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < Batch; ++m) {
        acc[m][i] = Ops::fma(Ops::errors(errors + m * stride + i * Ops::kLanes), u, acc[m][i]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kStep <= spec.depth; k += kStep) step(error + k, spec.error_stride, tile + k);
  if (k < spec.depth) {
    Error errors[Batch][kStep] = {};
    Tile entries[kStep] = {};
    const auto left = static_cast<size_t>(spec.depth - k);
    __builtin_memcpy(entries, tile + k, left * sizeof(Tile));
    for (int m = 0; m < Batch; ++m) {
      __builtin_memcpy(errors[m], error + m * spec.error_stride + k, left * sizeof(Error));
    }
    step(errors[0], kStep, entries);
  }
  for (int m = 0; m < Batch; ++m) {
    typename Ops::Acc lanes[Ops::kLanes];
    for (int i = 1; i < kSums; ++i) acc[m][0] = S::plus(acc[m][0], acc[m][i]);
    S::store(lanes, acc[m][0]);
    for (int width = Ops::kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    auto* sum = static_cast<typename Ops::Acc*>(spec.acc) + m * spec.acc_stride;
    *sum = spec.accumulate ? *sum + lanes[0] : lanes[0];
  }
}

template <class S, class Ops>
void dot(const MultiplySpec& spec) {
  for_few<kDotBatch>(spec.batch, [&](auto batch) { dot_batch<S, Ops, batch>(spec); });
}

template <class S, class Acc, class Out>
void scale(const ScaleSpec& spec) {
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(Out));
  const Acc factor = static_cast<Acc>(spec.scale);
  for (int64_t m = 0; m < spec.batch; ++m) {
    const Acc* acc = static_cast<const Acc*>(spec.acc) + m * spec.acc_stride;
    Out* out = static_cast<Out*>(spec.out) + m * spec.out_stride;
    int64_t i = 0;
    if (spec.past_caches) {  // whole lines only: other threads may share the first and the last
      const auto misplaced = reinterpret_cast<uintptr_t>(out) % kLineBytes / sizeof(Out);
      const int64_t first = (kLine - static_cast<int64_t>(misplaced)) % kLine;
      for (; i < first && i < spec.rows; ++i) out[i] = round_to<Out>(factor * acc[i]);
      for (; i + kLine <= spec.rows; i += kLine) {
        if constexpr (__is_same(Out, Acc)) {
          constexpr int64_t kVector = sizeof(S::set1(factor)) / sizeof(Out);
          for (int64_t j = i; j < i + kLine; j += kVector) {
            S::stream(out + j, S::times(S::load(acc + j), S::set1(factor)));
          }
        } else {
          alignas(kLineBytes) Out line[kLine];
          for (int64_t j = 0; j < kLine; ++j) line[j] = round_to<Out>(factor * acc[i + j]);
          S::store_past_caches(out + i, line);
        }
      }
    }
    for (; i < spec.rows; ++i) out[i] = round_to<Out>(factor * acc[i]);
  }
  if (spec.past_caches) S::fence();
}

}  // namespace
}  // namespace dfa
