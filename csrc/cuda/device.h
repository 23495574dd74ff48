// Every hardware primitive that the kernels use; above it they are plain C++. Without nvcc, the
// tests' emulator supplies the same names on the host.
#pragma once

#include "../entries.h"

#if !defined(__CUDACC__)
#include "emulator.h"  // of tests/backends/cuda_host
#else

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "warpgroup.h"

#define DFA_DEVICE __device__ __forceinline__
#define DFA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define DFA_ARGUMENT const __grid_constant__

namespace dfa {

struct alignas(16) Words16 {
  uint32_t x, y, z, w;
};

namespace device {

DFA_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DFA_DEVICE int block() { return static_cast<int>(blockIdx.x); }
DFA_DEVICE int blocks() { return static_cast<int>(gridDim.x); }

DFA_DEVICE char* shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

DFA_DEVICE void sync_block() { __syncthreads(); }
DFA_DEVICE void sync_warp() { __syncwarp(); }
DFA_DEVICE uint32_t ballot(bool holds) { return __ballot_sync(~0u, holds); }
DFA_DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(~0u, value, lane); }
DFA_DEVICE int lowest_bit(uint32_t mask) { return __ffs(static_cast<int>(mask)) - 1; }

// Copies 16 bytes from global to shared memory, or zeros if not `valid`. Addresses are multiples of
// 16.
DFA_DEVICE void copy_async(void* to, const void* from, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
}

// Waits for this thread's own copies. The block sees them after a barrier.
DFA_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

// In place of a kernel that the host never launches on this GPU.
DFA_DEVICE void trap() { __trap(); }

// Lets products of warpgroups read what this thread has copied, after the next barrier.
DFA_DEVICE void show_copies() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// c[16 x 8] += a[16 x 16] * b[16 x 8] over the warp, summed in fp32.
DFA_DEVICE void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DFA_DEVICE void multiply_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// log2 of a normal number. The absolute error is below 2^-18 if the result is below 16.
DFA_DEVICE float log2_approximate(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Picks bytes from (high, low), as PTX's prmt does.
DFA_DEVICE uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

DFA_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DFA_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// Products that are rounded before anything is added to them.
DFA_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
DFA_DEVICE double rounded_product(double a, double b) { return __dmul_rn(a, b); }

DFA_DEVICE float half_value(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Rounds both to nearest even and packs them, `low` in the lower half.
DFA_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

DFA_DEVICE uint32_t pack_half(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// For data that will not be read again soon.
template <class T>
DFA_DEVICE void store_streaming(T* to, T value) {
  __stcs(to, value);
}

DFA_DEVICE void store16(void* to, Words16 words) {
  __stcs(static_cast<uint4*>(to), make_uint4(words.x, words.y, words.z, words.w));
}

}  // namespace device

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or torch's next launch would report it again
  throw std::runtime_error(std::string("dfa_kernels: ") + what + ": " + cudaGetErrorString(status));
}

struct DeviceLimits {
  int processors;
  int shared_bytes;  // that a block may have
  bool warpgroups;   // can multiply together, and the kernels that do are in this binary
};

inline DeviceLimits device_limits() {
  int device = 0;
  DeviceLimits limits{};
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&limits.processors, cudaDevAttrMultiProcessorCount, device),
             "number of multiprocessors");
  check_cuda(
      cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      "shared memory per block");
#if defined(DFA_KERNELS_SM90A)
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
             "compute capability");
  limits.warpgroups = major == 9 && minor == 0;  // which is all that code for sm_90a runs on
#endif
  return limits;
}

// How many blocks a multiprocessor of the current device holds at once. Also allows the kernel all
// shared memory there is. CUDA is asked once, because its answer takes longer than a launch.
template <class Parameters>
int resident_blocks(void (*kernel)(Parameters), int threads, int shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int>, int> known;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  const void* const function = reinterpret_cast<const void*>(kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [place, is_new] = known.try_emplace({device, function, shared_bytes}, 0);
  if (!is_new) return place->second;
  int blocks = 0;
  cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            device_limits().shared_bytes);
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads,
                                                           static_cast<size_t>(shared_bytes));
  }
  if (status != cudaSuccess) known.erase(place);
  check_cuda(status, "occupancy of a kernel");
  place->second = blocks;
  return blocks;
}

template <class Parameters>
void launch(void (*kernel)(Parameters), const Parameters& parameters, int64_t blocks, int threads,
            int shared_bytes, void* stream) {
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  check_cuda(
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                       dim3(static_cast<unsigned>(threads)), arguments,
                       static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)),
      "kernel launch");
}

}  // namespace dfa
#endif
