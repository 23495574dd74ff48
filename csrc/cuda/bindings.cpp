// Registration of the CUDA kernels with PyTorch's stable ABI. They are a library of their own, so
// that the CPU kernels load where CUDA's libraries do not.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../projection.h"

namespace {

using dfa::check;
using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

// The current device's current stream.
void* current_stream() {
  void* stream = nullptr;
  const int32_t device = torch::stable::accelerator::getCurrentDeviceIndex();
  check(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
        "dfa_kernels: device ", device, " has no current stream");
  return stream;
}

// The stable ABI loses torch's own error. `backends/cuda.py` recognises this one and gets it again.
Tensor allocate(int64_t rows, int64_t columns, ScalarType dtype, Device device, const char* op) {
  std::optional<Tensor> out = dfa::new_matrix(rows, columns, dtype, device, op);
  if (!out.has_value()) {
    const int64_t size = dtype == ScalarType::Byte ? 1 : type_bytes(dfa::type_of(dtype, op, ""));
    check(false, op, ": cannot allocate ", rows * columns * size, " bytes");
  }
  return *std::move(out);
}

void check_dense(const dfa::Stream& stream, const char* op) {
  check(stream.distribution != dfa::Distribution::kHadamard, op,
        ": distribution must be normal, uniform or rademacher for the fused kernel, got "
        "'hadamard'");
}

// Memory that returns to the stream's pool when this object ends.
class Workspace {
 public:
  Workspace(Device device, const char* op) : device_(device), op_(op) {}

  void* take(int64_t bytes) {
    parts_.push_back(allocate(1, bytes, ScalarType::Byte, device_, op_));
    return parts_.back().mutable_data_ptr();
  }

 private:
  Device device_;
  const char* op_;
  std::vector<Tensor> parts_;
};

// The outputs of a projection, which the layers point to from then on.
std::vector<Tensor> new_signals(const Tensor& error, dfa::ProjectArguments& checked) {
  std::vector<Tensor> outputs;
  outputs.reserve(checked.layers.size());
  for (dfa::Layer& layer : checked.layers) {
    outputs.push_back(
        allocate(error.size(0), layer.size, checked.out_dtype, error.device(), "project"));
    layer.out = outputs.back().mutable_data_ptr();
  }
  return outputs;
}

dfa::StridedMatrix strided(const Tensor& error, dfa::Type type) {
  return {error.const_data_ptr(), error.size(0),   error.size(1),
          error.stride(0),        error.stride(1), type};
}

void check_terms(ScalarType error, int64_t terms, const char* op) {
  dfa::check_integer(terms, 1, error == ScalarType::Float ? 3 : 1, op, "terms");
}

// `device` with its index: "cuda" alone is the current device.
Device with_index(Device device, const char* op) {
  check(device.type() == DeviceType::CUDA, op, ": device must be cuda for backend cuda");
  if (device.index() >= 0) return device;
  return {DeviceType::CUDA, torch::stable::accelerator::getCurrentDeviceIndex()};
}

std::vector<Tensor> project(const Tensor& error, const std::vector<int64_t>& row_offsets,
                            const std::vector<int64_t>& sizes, const std::vector<double>& scales,
                            int64_t seed, int64_t column_offset, const std::string& distribution,
                            std::optional<ScalarType> dtype, int64_t terms, int64_t tile,
                            int64_t processors) {
  dfa::ProjectArguments checked = dfa::check_project(error, row_offsets, sizes, scales, seed,
                                                     column_offset, distribution, dtype);
  check_dense(checked.stream, "project");
  check(error.scalar_type() != ScalarType::Double,
        "project: error must be float16, bfloat16 or float32 for the fused kernel, got ",
        dfa::name(error.scalar_type()));
  check_terms(error.scalar_type(), terms, "project");
  dfa::check_integer(tile, -1, dfa::kMaxInteger, "project", "tile");
  dfa::check_integer(processors, 0, std::numeric_limits<int32_t>::max(), "project", "processors");
  const torch::stable::accelerator::DeviceGuard guard(error.device().index());
  std::vector<Tensor> outputs = new_signals(error, checked);
  Workspace workspace(error.device(), "project");
  dfa::project_cuda(
      checked.stream, strided(error, checked.error_type), std::move(checked.layers),
      checked.out_type, static_cast<int>(terms), {tile, processors},
      [&](int64_t bytes) { return workspace.take(bytes); }, current_stream());
  return outputs;
}

std::vector<Tensor> project_structured(const Tensor& error, const std::vector<int64_t>& row_offsets,
                                       const std::vector<int64_t>& sizes,
                                       const std::vector<double>& scales, int64_t seed,
                                       int64_t column_offset, const std::string& distribution,
                                       std::optional<ScalarType> dtype, int64_t processors) {
  dfa::ProjectArguments checked = dfa::check_project(error, row_offsets, sizes, scales, seed,
                                                     column_offset, distribution, dtype);
  check(checked.stream.distribution == dfa::Distribution::kHadamard,
        "project: distribution must be structured for this operator, got '", distribution, "'");
  dfa::check_integer(processors, 0, std::numeric_limits<int32_t>::max(), "project", "processors");
  const torch::stable::accelerator::DeviceGuard guard(error.device().index());
  std::vector<Tensor> outputs = new_signals(error, checked);
  Workspace workspace(error.device(), "project");
  dfa::project_structured_cuda(
      checked.stream, strided(error, checked.error_type), checked.layers, checked.out_type,
      {-1, processors}, [&](int64_t bytes) { return workspace.take(bytes); }, current_stream());
  return outputs;
}

// The transpose of `project_structured`.
Tensor adjoint_structured(const std::vector<Tensor>& signals,
                          const std::vector<int64_t>& row_offsets,
                          const std::vector<double>& scales, int64_t seed, int64_t column_offset,
                          const std::string& distribution, int64_t columns, ScalarType dtype) {
  const char* const op = "project_adjoint";
  const Device device = signals[0].device();
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  std::vector<Tensor> contiguous;
  const dfa::AdjointArguments checked = dfa::check_adjoint(
      signals, row_offsets, scales, seed, column_offset, distribution, columns, contiguous);
  Tensor out = allocate(checked.batch, columns, dtype, device, op);
  Workspace workspace(device, op);
  dfa::adjoint_structured_cuda(
      checked.stream, checked.layers, checked.in_type, checked.batch, columns,
      dfa::type_of(dtype, op, "dtype"), out.mutable_data_ptr(),
      [&](int64_t bytes) { return workspace.take(bytes); }, current_stream());
  return out;
}

// Entries of U; without their distribution's factor if `lattice`.
Tensor entries(int64_t rows, int64_t columns, int64_t seed, int64_t row_offset,
               int64_t column_offset, const std::string& distribution, ScalarType dtype,
               Device device, bool lattice) {
  const char* const op = "feedback_matrix";
  device = with_index(device, op);
  const dfa::Stream stream =
      dfa::check_feedback_matrix(rows, columns, seed, row_offset, column_offset, distribution);
  const dfa::Type type = dfa::type_of(dtype, op, "dtype");
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  Tensor out = allocate(rows, columns, dtype, device, op);
  const auto row = static_cast<uint64_t>(row_offset);
  if (stream.distribution == dfa::Distribution::kHadamard) {
    check(!lattice, op, ": lattice must be false for 'hadamard', got true");
    dfa::feedback_matrix_structured_cuda(stream, row, rows, columns, type, out.mutable_data_ptr(),
                                         current_stream());
  } else {
    dfa::feedback_matrix_cuda(stream, row, rows, columns, type, lattice, out.mutable_data_ptr(),
                              current_stream());
  }
  return out;
}

// The tiles of a projection, for tests to force: their indices and their names.
std::tuple<std::vector<int64_t>, std::vector<std::string>> tiles(const std::string& distribution,
                                                                 ScalarType dtype, int64_t terms,
                                                                 Device device) {
  const char* const op = "cuda_tiles";
  const torch::stable::accelerator::DeviceGuard guard(with_index(device, op).index());
  check_terms(dtype, terms, op);
  const dfa::Stream stream = dfa::stream_of(0, 0, 0, distribution, op);
  check_dense(stream, op);
  std::tuple<std::vector<int64_t>, std::vector<std::string>> found;
  for (const dfa::Tile& tile : dfa::cuda_tiles(
           stream.distribution, dfa::type_of(dtype, op, "dtype"), static_cast<int>(terms))) {
    std::get<0>(found).push_back(tile.index);
    std::get<1>(found).push_back(tile.name);
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfa_kernels, CUDA, m) {
  m.impl("cuda_fused", TORCH_BOX(&project));
  m.impl("cuda_structured", TORCH_BOX(&project_structured));
  m.impl("cuda_structured_adjoint", TORCH_BOX(&adjoint_structured));
}

// No tensor argument: there is no backend to dispatch on. This key goes before
// CompositeExplicitAutograd, where Python has the kernels that load this library.
STABLE_TORCH_LIBRARY_IMPL(dfa_kernels, CompositeExplicitAutogradNonFunctional, m) {
  m.impl("cuda_entries", TORCH_BOX(&entries));
  m.impl("cuda_tiles", TORCH_BOX(&tiles));
}

// `import dfa_kernels._CUDA` loads the library and so makes the registrations above. The module
// itself is empty.
PyMODINIT_FUNC PyInit__CUDA(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_CUDA", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
