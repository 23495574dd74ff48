// Runs cases from standard input through the CUDA backend's own host code and kernels, emulated:
// one projection or feedback matrix each, results to standard output. Every buffer is an allocation
// of its exact size, freshly filled with NaN, so that the address sanitizer sees what is read or
// written outside.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/fragments.h"
#include "../../csrc/projection.h"

namespace {

int64_t next() {
  int64_t value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) std::exit(0);
  return value;
}

// `offset` bytes into an allocation, so that nothing is aligned by accident.
struct Buffer {
  explicit Buffer(int64_t bytes, int64_t offset = 0)
      : memory(static_cast<char*>(std::malloc(static_cast<size_t>(bytes + offset))), std::free),
        data(memory.get() + offset) {
    std::memset(memory.get(), 0xff, static_cast<size_t>(bytes + offset));
  }
  std::unique_ptr<char, decltype(&std::free)> memory;
  char* data;
};

void project() {
  dfa::Stream stream{};
  stream.seed = static_cast<uint64_t>(next());
  stream.distribution = static_cast<dfa::Distribution>(next());
  stream.column_offset = next();
  dfa::StridedMatrix error{};
  error.rows = next();
  error.columns = next();
  error.row_stride = next();
  error.column_stride = next();
  error.type = static_cast<dfa::Type>(next());
  const auto out_type = static_cast<dfa::Type>(next());
  const int terms = static_cast<int>(next());
  const int64_t misaligned = next(), bytes = next();
  const Buffer input(bytes, misaligned);
  if (std::fread(input.data, 1, static_cast<size_t>(bytes), stdin) != static_cast<size_t>(bytes)) {
    std::exit(1);
  }
  error.data = input.data;
  std::vector<dfa::Range> ranges(static_cast<size_t>(next()));
  std::vector<Buffer> outputs;
  for (dfa::Range& range : ranges) {
    range.row_offset = static_cast<uint64_t>(next());
    range.size = next();
    const int64_t scale = next();
    std::memcpy(&range.scale, &scale, sizeof scale);
    outputs.emplace_back(error.rows * range.size * dfa::type_bytes(out_type));
    range.out = outputs.back().data;
  }
  std::vector<Buffer> workspace;
  const auto allocate = [&](int64_t size) -> void* {
    workspace.emplace_back(size);
    return workspace.back().data;
  };
  const std::vector<dfa::Range> kept = ranges;
  dfa::launches = 0;
  dfa::project_cuda(stream, error, std::move(ranges), out_type, terms, allocate, nullptr);
  const int64_t log[] = {dfa::launches, dfa::last_threads, dfa::last_shared_bytes};
  std::fwrite(log, sizeof log[0], 3, stdout);
  for (const dfa::Range& range : kept) {
    std::fwrite(range.out, static_cast<size_t>(dfa::type_bytes(out_type)),
                static_cast<size_t>(error.rows * range.size), stdout);
  }
}

void feedback_matrix() {
  dfa::Stream stream{};
  stream.seed = static_cast<uint64_t>(next());
  stream.distribution = static_cast<dfa::Distribution>(next());
  stream.column_offset = next();
  const auto row_offset = static_cast<uint64_t>(next());
  const int64_t rows = next(), columns = next();
  const auto type = static_cast<dfa::Type>(next());
  const bool lattice = next() != 0;
  const Buffer out(rows * columns * dfa::type_bytes(type), next());
  dfa::feedback_matrix_cuda(stream, row_offset, rows, columns, type, lattice, out.data, nullptr);
  std::fwrite(out.data, static_cast<size_t>(dfa::type_bytes(type)),
              static_cast<size_t>(rows * columns), stdout);
}

// The maps of fragments.h against the mathematics: each product of a column of U with the same
// column of the error is taken once, by operands that meet at one contraction index. And 8 lanes
// that load or copy 16 bytes each touch every bank once.
void fragments() {
  using namespace dfa;
  bool holds = true;
  for (int row = 0; row < kFragmentRows; ++row) {
    int seen[kBlock32] = {};
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        if (fragment_row(lane, half) != row) continue;
        for (int step = 0; step < 2; ++step) {
          for (int pair = 0; pair < 2; ++pair) {
            for (int i = 0; i < 2; ++i) ++seen[column_of(lane % 4, word_of(step, pair), i)];
            // Registers 0 and 1 hold the fragment's contraction indices below 8, in rows below 8
            // and above; registers 2 and 3 the others (PTX, mma.m16n8k16). B's register 0 or 1
            // has the same indices, from word 2 * step + register of the error's 16 bytes.
            holds &= a_register(half, pair) == 2 * pair + (row >= 8 ? 1 : 0);
            holds &= word_of(step, pair) == 2 * step + pair;
          }
        }
      }
    }
    for (int count : seen) holds &= count == 1;
  }
  for (int first = 0; first < 32; first += 8) {
    for (int block = 0; block < kChunkColumns / kBlock32; ++block) {
      unsigned loaded = 0, copied = 0;
      for (int lane = first; lane < first + 8; ++lane) {
        loaded |= 1u << staged_byte(lane / 4, 4 * block + lane % 4) / 16 % 8;
        copied |= 1u << staged_byte(lane / kPieces, lane % kPieces) / 16 % 8;
      }
      holds &= loaded == 0xff && copied == 0xff;
    }
  }
  const int64_t result = holds;
  std::fwrite(&result, sizeof result, 1, stdout);
}

}  // namespace

int main() {
  for (;;) {
    switch (next()) {
      case 0:
        project();
        break;
      case 1:
        feedback_matrix();
        break;
      default:
        fragments();
    }
  }
}
