// Builds the table of one instruction set from its lanes. Included once per set, after the set's
// target pragma. Everything here and in the headers it includes has internal linkage: the linker
// must not replace a function of one set by another's.
#pragma once

#include "fill.h"
#include "hadamard.h"
#include "multiply.h"
#include "tile.h"

namespace dfa {
namespace {

template <class S, class Real>
constexpr TransformKernels make_transforms() {
  return {transform<S, Real, true>, transform<S, Real, false>, transform_signal<S, Real>,
          turn<S, Real>, accumulate<S, Real>};
}

template <class S>
constexpr Kernels make_kernels(const char* name) {
  Kernels k{};
  k.name = name;
  k.panel = 2 * S::kLanes;
  k.max_batch_f32 = Float32Ops<S>::kMaxBatch;
  k.max_batch_f64 = Float64Ops<S>::kMaxBatch;
  k.tile_f32 = make_tile<S, float>;
  k.tile_bf16 = make_tile<S, uint32_t>;
  k.unpack_tile = unpack_tile<S>;
  k.multiply_f32 = multiply<S, Float32Ops<S>>;
  k.multiply_kept = multiply_kept<S>;
  k.multiply_f64 = multiply<S, Float64Ops<S>>;
  k.multiply_bf16 = nullptr;
  k.fused_f32 = fused<S, Float32Ops<S>>;
  k.fused_bf16 = nullptr;
  k.dot_f32 = dot<S, Float32Ops<S>>;
  k.dot_f64 = dot<S, Float64Ops<S>>;
  k.dot_bf16 = nullptr;
  k.make_signs = make_signs<S>;
  k.transform_f32 = make_transforms<S, float>();
  k.transform_f64 = make_transforms<S, double>();
  const ScaleKernel scale_f32[] = {scale<S, float, float>, scale<S, float, BFloat16>,
                                   scale<S, float, Half>, scale<S, float, double>};
  const ScaleKernel scale_f64[] = {scale<S, double, float>, scale<S, double, BFloat16>,
                                   scale<S, double, Half>, scale<S, double, double>};
  const FillKernel fills[] = {fill<S, float>, fill<S, BFloat16>, fill<S, Half>, fill<S, double>};
  for (int i = 0; i < 4; ++i) {
    k.scale_f32[i] = scale_f32[i];
    k.scale_f64[i] = scale_f64[i];
    k.fill[i] = fills[i];
  }
  return k;
}

}  // namespace
}  // namespace dfa
