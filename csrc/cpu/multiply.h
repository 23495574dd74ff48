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
  using V = typename S::F;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kMaxBatch = S::kBatchF32;
  static V zero() { return S::zero(); }
  static V tile(const Tile* p) { return S::load(p); }
  static V error(Error e) { return S::set1(e); }
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
  static V fma(V e, V u, V acc) { return S::fma(e, u, acc); }
};

template <class S, class Ops, int Batch>
void multiply_batch(const MultiplySpec& spec) {
  constexpr int kPanel = 2 * S::kLanes;
  constexpr int kVectors = kPanel / Ops::kLanes;
  const auto* error = static_cast<const typename Ops::Error*>(spec.error);
  const auto* tile = static_cast<const typename Ops::Tile*>(spec.tile);
  auto* out = static_cast<typename Ops::Acc*>(spec.acc);
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
#pragma GCC unroll 16
  for (int m = 0; m < Batch; ++m) {
    typename Ops::Acc* row = out + m * spec.acc_stride;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (spec.accumulate) acc[m][v] = S::plus(acc[m][v], S::load(row + v * Ops::kLanes));
      S::store(row + v * Ops::kLanes, acc[m][v]);
    }
  }
}

template <class S, class Ops, int Batch = Ops::kMaxBatch>
void multiply(const MultiplySpec& spec) {
  if constexpr (Batch > 1) {
    if (spec.batch < Batch) return multiply<S, Ops, Batch - 1>(spec);
  }
  multiply_batch<S, Ops, Batch>(spec);
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
        alignas(kLineBytes) Out line[kLine];
        for (int64_t j = 0; j < kLine; ++j) line[j] = round_to<Out>(factor * acc[i + j]);
        S::store_past_caches(out + i, line);
      }
    }
    for (; i < spec.rows; ++i) out[i] = round_to<Out>(factor * acc[i]);
  }
  if (spec.past_caches) S::fence();
}

}  // namespace
}  // namespace dfa
