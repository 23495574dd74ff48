// Numbers from standard input, results to standard output, and buffers. Every buffer is an
// allocation of its exact size, filled with NaN, so the address sanitizer sees any access outside.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../../csrc/cuda/device.h"
#include "../../../csrc/projection.h"

namespace {

inline int64_t next() {
  int64_t value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) std::exit(0);
  return value;
}

// Begins `offset` bytes into an allocation, so that nothing is aligned by accident.
struct Buffer {
  explicit Buffer(int64_t bytes, int64_t offset = 0)
      : memory(static_cast<char*>(std::malloc(static_cast<size_t>(bytes + offset))), std::free),
        data(memory.get() + offset) {
    std::memset(memory.get(), 0xff, static_cast<size_t>(bytes + offset));
  }
  std::unique_ptr<char, decltype(&std::free)> memory;
  char* data;
};

inline void read(void* to, int64_t bytes) {
  if (std::fread(to, 1, static_cast<size_t>(bytes), stdin) != static_cast<size_t>(bytes)) {
    std::exit(1);
  }
}

inline void write(const std::vector<int64_t>& numbers) {
  std::fwrite(numbers.data(), sizeof numbers[0], numbers.size(), stdout);
}

inline void write(const void* from, int64_t bytes) {
  std::fwrite(from, 1, static_cast<size_t>(bytes), stdout);
}

// The made-up GPU has products of warpgroups if a block may have as much memory as on Hopper.
inline dfa::DeviceLimits limits_of(int processors, int64_t shared_bytes) {
  return {processors, static_cast<int>(shared_bytes), shared_bytes >= 227 << 10};
}

// The shape, strides and type of an error. Its numbers come later.
inline dfa::StridedMatrix next_error() {
  dfa::StridedMatrix error{};
  error.batch = next();
  error.columns = next();
  error.batch_stride = next();
  error.column_stride = next();
  error.type = static_cast<dfa::Type>(next());
  return error;
}

// The layers, each with `batch` rows of numbers of this type in a buffer.
inline std::vector<dfa::Layer> next_layers(int64_t batch, dfa::Type type, int64_t misaligned,
                                           std::vector<Buffer>& signals) {
  std::vector<dfa::Layer> layers(static_cast<size_t>(next()));
  for (dfa::Layer& layer : layers) {
    layer.row_offset = static_cast<uint64_t>(next());
    layer.size = next();
    const int64_t scale = next();
    std::memcpy(&layer.scale, &scale, sizeof scale);
    signals.emplace_back(batch * layer.size * dfa::type_bytes(type), misaligned);
    layer.out = signals.back().data;
  }
  return layers;
}

}  // namespace
