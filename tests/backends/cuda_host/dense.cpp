// Runs cases from standard input through the CUDA backend's own host code and emulated kernels. A
// case is a projection or a feedback matrix of independent entries; results go to standard output.
#include <cstdio>
#include <vector>

#include "../../../csrc/cuda/device.h"
#include "../../../csrc/cuda/fragments.h"
#include "../../../csrc/cuda/kernels.h"
#include "../../../csrc/projection.h"
#include "requests.h"

namespace {

// The index of the tile whose kernel was launched last.
int64_t last_tile() {
  using namespace dfa;
  for (int i = 0; i < kDense; ++i) {
    for (const Operand operand : {Operand::kBFloat16, Operand::kHalf, Operand::kExact}) {
      for (int shape = 0; shape < kShapes; ++shape) {
        const FusedKernel kernel = fused_kernel(static_cast<Distribution>(i), operand, shape);
        if (kernel.kernel && reinterpret_cast<const void*>(kernel.kernel) == last_kernel) {
          return shape;
        }
      }
    }
  }
  return -1;
}

void project() {
  dfa::Stream stream{};
  stream.seed = static_cast<uint64_t>(next());
  stream.distribution = static_cast<dfa::Distribution>(next());
  stream.column_offset = next();
  dfa::StridedMatrix error = next_error();
  const auto out_type = static_cast<dfa::Type>(next());
  const int terms = static_cast<int>(next());
  dfa::Forced forced{};
  forced.tile = next();
  forced.processors = next();
  dfa::emulated.limits = limits_of(dfa::emulated.limits.processors, next());
  const int64_t misaligned = next(), bytes = next();
  const Buffer input(bytes, misaligned);
  read(input.data, bytes);
  error.data = input.data;
  std::vector<Buffer> outputs;
  std::vector<dfa::Layer> layers = next_layers(error.batch, out_type, 0, outputs);
  std::vector<Buffer> workspace;
  const auto allocate = [&](int64_t size) -> void* {
    workspace.emplace_back(size);
    return workspace.back().data;
  };
  const std::vector<dfa::Layer> kept = layers;
  dfa::launches = 0;
  dfa::project_cuda(stream, error, std::move(layers), out_type, terms, forced, allocate, nullptr);
  write({dfa::launches, last_tile(), dfa::last_blocks});
  for (const dfa::Layer& layer : kept) {
    write(layer.out, dfa::type_bytes(out_type) * error.batch * layer.size);
  }
}

// The tile and the number of blocks for one layer, on a GPU of given multiprocessors and shared
// memory. Nothing is computed.
void choice() {
  const dfa::Device kept = dfa::emulated;
  const int processors = static_cast<int>(next()), shared_bytes = static_cast<int>(next());
  dfa::emulated = {limits_of(processors, shared_bytes), 16, false};
  dfa::Stream stream{};
  stream.distribution = static_cast<dfa::Distribution>(next());
  const std::vector<dfa::Layer> layers = {{0, next(), 1.0, nullptr}};
  dfa::StridedMatrix error{};
  error.batch = next();
  error.columns = next();
  error.batch_stride = error.columns;
  error.column_stride = 1;
  error.type = static_cast<dfa::Type>(next());
  const int terms = static_cast<int>(next());
  dfa::project_cuda(
      stream, error, layers, error.type, terms, {}, [](int64_t) -> void* { return nullptr; },
      nullptr);
  dfa::emulated = kept;
  write({last_tile(), dfa::last_blocks});
}

// The tiles for such an error, a line each: index, rows, batch, columns of a stage, name.
void tiles() {
  dfa::emulated.limits = limits_of(dfa::emulated.limits.processors, next());
  const auto type = static_cast<dfa::Type>(next());
  const int terms = static_cast<int>(next());
  for (const dfa::Tile& tile : dfa::cuda_tiles(dfa::Distribution::kNormal, type, terms)) {
    const auto operand = terms == 3                    ? dfa::Operand::kExact
                         : type == dfa::Type::kFloat16 ? dfa::Operand::kHalf
                                                       : dfa::Operand::kBFloat16;
    const dfa::FusedKernel kernel =
        dfa::fused_kernel(dfa::Distribution::kNormal, operand, static_cast<int>(tile.index));
    std::printf("%d\t%d\t%d\t%d\t%s\n", static_cast<int>(tile.index), kernel.rows, kernel.batch,
                kernel.stage_columns, tile.name.c_str());
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
  write(out.data, rows * columns * dfa::type_bytes(type));
}

// Checks the maps of fragments.h. Each column of U meets the same column of the error once, at one
// contraction index, and 8 lanes that load or copy 16 bytes each touch every bank once.
void fragments() {
  using namespace dfa;
  bool holds = true;
  for (int row = 0; row < kFragmentRows; ++row) {
    int seen[kStripColumns] = {};
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        if (fragment_row(lane, half) != row) continue;
        for (int step = 0; step < 2; ++step) {
          for (int pair = 0; pair < 2; ++pair) {
            for (int i = 0; i < 2; ++i) ++seen[column_of(lane % 4, word_of(step, pair), i)];
            // Registers 0 and 1 hold contraction indices below 8, for rows below 8 and for the
            // others; registers 2 and 3 hold the other indices (PTX, mma.m16n8k16). B's registers
            // 0 and 1 have the same indices, from word 2 * step + register of the error's 16 bytes.
            holds &= a_register(half, pair) == 2 * pair + (row >= 8 ? 1 : 0);
            holds &= word_of(step, pair) == 2 * step + pair;
          }
        }
      }
    }
    for (int count : seen) holds &= count == 1;
  }
  for (int first = 0; first < 32; first += 8) {
    for (int strip = 0; strip < kChunkColumns / kStripColumns; ++strip) {
      unsigned loaded = 0, copied = 0;
      for (int lane = first; lane < first + 8; ++lane) {
        loaded |= 1u << staged_byte(lane / 4, 4 * strip + lane % 4) / 16 % 8;
        copied |= 1u << staged_byte(lane / kPieces, lane % kPieces) / 16 % 8;
      }
      holds &= loaded == 0xff && copied == 0xff;
    }
  }
  write({holds});
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
      case 3:
        choice();
        break;
      case 4:
        tiles();
        break;
      default:
        fragments();
    }
  }
}
