// Buffers and threads of a call.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

namespace dfa {

constexpr std::align_val_t kAlignment{64};

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete(p, kAlignment); }
};
using Buffer = std::unique_ptr<char, AlignedDelete>;

inline Buffer allocate(int64_t bytes) {
  return Buffer(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kAlignment)));
}

// Runs work(index, worker) for every index on torch's threads. A free thread takes the next index.
template <class Work>
void run_parallel(int64_t count, int64_t workers, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto drain = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < count; i = next++) work(i, worker);
    }
  };
  if (workers == 1) return drain(0, 1);
  torch::stable::parallel_for(0, workers, 1, drain);
}

}  // namespace dfa
