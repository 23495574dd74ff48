// Registration of the CUDA kernels with PyTorch's stable ABI, in a library of its own: where it
// cannot be loaded, the CPU kernels still can.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "../projection.h"

namespace {

using dfa::check;
using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

// Of the current device.
void* current_stream() {
  void* stream = nullptr;
  const int32_t device = torch::stable::accelerator::getCurrentDeviceIndex();
  check(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
        "dfa_kernels: device ", device, " has no current stream");
  return stream;
}

// Torch's own error does not come through the stable ABI; `backends/cuda.py` asks for it.
Tensor allocate(int64_t rows, int64_t columns, ScalarType dtype, Device device, const char* op) {
  dfa::check_fits(rows, columns, op);
  try {
    return torch::stable::empty(std::vector<int64_t>{rows, columns}, dtype, std::nullopt, device);
  } catch (const std::exception&) {
    const int64_t size = dtype == ScalarType::Byte ? 1 : type_bytes(dfa::type_of(dtype, op, ""));
    check(false, op, ": cannot allocate ", rows * columns * size, " bytes");
    throw;
  }
}

std::vector<Tensor> project(const Tensor& error, const std::vector<int64_t>& row_offsets,
                            const std::vector<int64_t>& sizes, const std::vector<double>& scales,
                            int64_t seed, int64_t column_offset, const std::string& distribution,
                            std::optional<ScalarType> dtype, int64_t terms) {
  dfa::ProjectArguments checked = dfa::check_project(error, row_offsets, sizes, scales, seed,
                                                     column_offset, distribution, dtype);
  check(error.scalar_type() != ScalarType::Double,
        "project: error must be float16, bfloat16 or float32 for the fused kernel, got ",
        dfa::name(error.scalar_type()));
  const bool split = error.scalar_type() == ScalarType::Float;
  dfa::check_integer(terms, 1, split ? 3 : 1, "project", "terms");
  const Device device = error.device();
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  std::vector<Tensor> outputs;
  outputs.reserve(sizes.size());
  for (dfa::Range& range : checked.ranges) {
    outputs.push_back(allocate(error.size(0), range.size, checked.out_dtype, device, "project"));
    range.out = outputs.back().mutable_data_ptr();
  }
  std::vector<Tensor> workspace;  // goes back to the stream's pool when this function returns
  const auto take = [&](int64_t bytes) {
    workspace.push_back(allocate(1, bytes, ScalarType::Byte, device, "project"));
    return workspace.back().mutable_data_ptr();
  };
  dfa::project_cuda(checked.stream,
                    {error.const_data_ptr(), error.size(0), error.size(1), error.stride(0),
                     error.stride(1), checked.error_type},
                    std::move(checked.ranges), checked.out_type, static_cast<int>(terms), take,
                    current_stream());
  return outputs;
}

// A block of U, with uniform entries as their exact lattice if `lattice`.
Tensor entries(int64_t rows, int64_t columns, int64_t seed, int64_t row_offset,
               int64_t column_offset, const std::string& distribution, ScalarType dtype,
               Device device, bool lattice) {
  const char* const op = "feedback_matrix";
  check(device.type() == DeviceType::CUDA, op, ": device must be cuda for backend cuda");
  const dfa::Stream stream =
      dfa::check_feedback_matrix(rows, columns, seed, row_offset, column_offset, distribution);
  const dfa::Type type = dfa::type_of(dtype, op, "dtype");
  const int32_t index = device.index() >= 0 ? static_cast<int32_t>(device.index())
                                            : torch::stable::accelerator::getCurrentDeviceIndex();
  const torch::stable::accelerator::DeviceGuard guard(index);
  Tensor out = allocate(rows, columns, dtype, Device(DeviceType::CUDA, index), op);
  dfa::feedback_matrix_cuda(stream, static_cast<uint64_t>(row_offset), rows, columns, type, lattice,
                            out.mutable_data_ptr(), current_stream());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfa_kernels, CUDA, m) { m.impl("cuda_fused", TORCH_BOX(&project)); }

// No tensor argument: there is no backend to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(dfa_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_entries", TORCH_BOX(&entries));
}

// `import dfa_kernels._CUDA` loads the library; the registrations above are its only content.
PyMODINIT_FUNC PyInit__CUDA(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_CUDA", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
