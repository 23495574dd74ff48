// The same for structured feedback: projections, their transposes and matrices.
#include <vector>

#include "../../../csrc/cuda/hadamard.h"
#include "requests.h"

namespace {

std::vector<Buffer> workspace;

void* allocate(int64_t bytes) {
  workspace.emplace_back(bytes);
  return workspace.back().data;
}

dfa::Stream next_stream() {
  dfa::Stream stream{};
  stream.seed = static_cast<uint64_t>(next());
  stream.distribution = dfa::Distribution::kHadamard;
  stream.column_offset = next();
  return stream;
}

void project() {
  const dfa::Stream stream = next_stream();
  dfa::StridedMatrix error = next_error();
  const auto out_type = static_cast<dfa::Type>(next());
  dfa::Forced forced{};
  forced.processors = next();
  forced.transformed_bytes = next();
  dfa::emulated.limits = limits_of(dfa::emulated.limits.processors, next());
  const int64_t misaligned = next(), bytes = next();
  const Buffer input(bytes, misaligned);
  read(input.data, bytes);
  error.data = input.data;
  std::vector<Buffer> signals;
  const std::vector<dfa::Layer> layers = next_layers(error.batch, out_type, misaligned, signals);
  int64_t most = 0;
  const auto count = [&](int64_t size) {
    most += size;
    return allocate(size);
  };
  dfa::launches = 0;
  dfa::project_structured_cuda(stream, error, layers, out_type, forced, count, nullptr);
  write({dfa::launches, dfa::last_blocks, most});
  for (const dfa::Layer& layer : layers) {
    write(layer.out, dfa::type_bytes(out_type) * error.batch * layer.size);
  }
}

void adjoint() {
  const dfa::Stream stream = next_stream();
  const int64_t batch = next(), columns = next();
  const auto in_type = static_cast<dfa::Type>(next()), out_type = static_cast<dfa::Type>(next());
  std::vector<Buffer> signals;
  const std::vector<dfa::Layer> layers = next_layers(batch, in_type, 0, signals);
  for (const dfa::Layer& layer : layers) {
    read(layer.out, batch * layer.size * dfa::type_bytes(in_type));
  }
  const Buffer out(batch * columns * dfa::type_bytes(out_type));
  dfa::adjoint_structured_cuda(stream, layers, in_type, batch, columns, out_type, out.data,
                               allocate, nullptr);
  write(out.data, batch * columns * dfa::type_bytes(out_type));
}

void feedback_matrix() {
  const dfa::Stream stream = next_stream();
  const auto row_offset = static_cast<uint64_t>(next());
  const int64_t rows = next(), columns = next();
  const auto type = static_cast<dfa::Type>(next());
  const Buffer out(rows * columns * dfa::type_bytes(type), next());
  dfa::feedback_matrix_structured_cuda(stream, row_offset, rows, columns, type, out.data, nullptr);
  write(out.data, rows * columns * dfa::type_bytes(type));
}

// The bytes at which a warp's lanes access their squares, in three ways.
struct Accesses {
  int64_t rows[dfa::kPieceRows][32], columns[dfa::kPieceRows][32], spread[dfa::kOwn][32];
};

struct Recording {
  Accesses* accesses;
};

void record(Recording recording) {
  const dfa::Square<float> square(dfa::half());
  const int lane = dfa::device::thread();
  const auto byte = [](const void* at) {
    return static_cast<const char*>(at) - dfa::device::shared();
  };
  for (int i = 0; i < dfa::kPieceRows; ++i) {
    recording.accesses->rows[i][lane] = byte(&square.in_rows(i));
    recording.accesses->columns[i][lane] = byte(&square.in_columns(i));
  }
  for (int i = 0; i < dfa::kOwn; ++i) {
    recording.accesses->spread[i][lane] = byte(&square.spread(i));
  }
}

void record_accesses() {
  Accesses accesses{};
  dfa::launch(record, Recording{&accesses}, 1, 32, 2 * dfa::Square<float>::kBytes, nullptr);
  write(&accesses, sizeof accesses);
}

}  // namespace

int main() {
  for (;; workspace.clear()) {
    switch (next()) {
      case 0:
        project();
        break;
      case 1:
        feedback_matrix();
        break;
      case 3:
        record_accesses();
        break;
      default:
        adjoint();
    }
  }
}
