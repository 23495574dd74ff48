// Registration with PyTorch's stable ABI. The Python package defines the schemas (ops.py) before it
// loads this library.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/kept.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "projection.h"

// Torch's from 2.11 on; null with an older one.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* made,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* deleter_context);

namespace {

using dfa::check;
using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor allocate(int64_t rows, int64_t columns, ScalarType dtype, const char* op) {
  std::optional<Tensor> out = dfa::new_matrix(rows, columns, dtype, DeviceType::CPU, op);
  check(out.has_value(), op, ": output must fit in memory, got [", rows, ", ", columns, "]");
  dfa::advise_huge_pages(out->mutable_data_ptr(),
                         rows * columns * static_cast<int64_t>(out->element_size()));
  return *std::move(out);
}

// Whether torch.empty fills memory with NaN and the largest integers, which only torch can say.
bool fills_memory() {
  const std::vector<int64_t> four = {4};
  const Tensor sample = torch::stable::empty(four, ScalarType::Long);
  const auto* value = static_cast<const int64_t*>(sample.const_data_ptr());
  const auto largest = [](int64_t x) { return x == std::numeric_limits<int64_t>::max(); };
  return std::all_of(value, value + 4, largest);
}

// A signal's tensor. A large one is in memory that is used again.
Tensor allocate_signal(int64_t rows, int64_t columns, ScalarType dtype, const char* op) {
  dfa::check_fits(rows, columns, op);
  const int64_t bytes = rows * columns * dfa::type_bytes(dfa::type_of(dtype, op, "dtype"));
  if (torch_from_blob == nullptr || bytes < dfa::kPooledBytes) {
    return allocate(rows, columns, dtype, op);
  }
  const bool fill = fills_memory();
  dfa::Block* const block = dfa::take_block(bytes);
  if (block == nullptr) return allocate(rows, columns, dtype, op);
  void* const data = dfa::data_of(block);
  if (fill) std::memset(data, 0xff, static_cast<size_t>(bytes));  // NaN in every dtype
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  const AOTITorchError status =
      torch_from_blob(data, 2, sizes, strides, 0, code, aoti_torch_device_type_cpu(), -1, &made,
                      aoti_torch_layout_strided(), nullptr, 0, dfa::give_block, block);
  check(status == AOTI_TORCH_SUCCESS, op, ": cannot make a tensor of ", bytes, " bytes");
  return Tensor(made);
}

std::vector<Tensor> project(const Tensor& error, const std::vector<int64_t>& row_offsets,
                            const std::vector<int64_t>& sizes, const std::vector<double>& scales,
                            int64_t seed, int64_t column_offset, const std::string& distribution,
                            std::optional<ScalarType> dtype) {
  dfa::ProjectArguments checked = dfa::check_project(error, row_offsets, sizes, scales, seed,
                                                     column_offset, distribution, dtype);
  const int64_t batch = error.size(0);
  const Tensor contiguous = error.is_contiguous() ? error : torch::stable::contiguous(error);
  dfa::begin_call();
  std::vector<Tensor> outputs;
  outputs.reserve(sizes.size());
  for (dfa::Layer& layer : checked.layers) {
    outputs.push_back(allocate_signal(batch, layer.size, checked.out_dtype, "project"));
    layer.out = outputs.back().mutable_data_ptr();
  }
  if (batch == 0) return outputs;
  dfa::project_cpu(checked.stream,
                   {contiguous.const_data_ptr(), batch, error.size(1), checked.error_type},
                   std::move(checked.layers), checked.out_type);
  return outputs;
}

// The transpose of `project`, of structured distributions.
Tensor structured_adjoint(const std::vector<Tensor>& signals,
                          const std::vector<int64_t>& row_offsets,
                          const std::vector<double>& scales, int64_t seed, int64_t column_offset,
                          const std::string& distribution, int64_t columns, ScalarType dtype) {
  const char* const op = "project_adjoint";
  std::vector<Tensor> contiguous;
  const dfa::AdjointArguments checked = dfa::check_adjoint(
      signals, row_offsets, scales, seed, column_offset, distribution, columns, contiguous);
  dfa::begin_call();
  Tensor out = allocate_signal(checked.batch, columns, dtype, op);
  dfa::adjoint_structured_cpu(checked.stream, checked.layers, checked.in_type, checked.batch,
                              columns, dfa::type_of(dtype, op, "dtype"), out.mutable_data_ptr());
  return out;
}

Tensor feedback_matrix(int64_t rows, int64_t columns, int64_t seed, int64_t row_offset,
                       int64_t column_offset, const std::string& distribution, ScalarType dtype,
                       torch::stable::Device device) {
  const char* const op = "feedback_matrix";
  check(device.type() == DeviceType::CPU, op, ": device must be cpu for backend cpp");
  const dfa::Stream stream =
      dfa::check_feedback_matrix(rows, columns, seed, row_offset, column_offset, distribution);
  const dfa::Type type = dfa::type_of(dtype, op, "dtype");
  Tensor out = allocate(rows, columns, dtype, op);
  dfa::feedback_matrix_cpu(stream, static_cast<uint64_t>(row_offset), rows, columns, type,
                           out.mutable_data_ptr());
  return out;
}

// Bytes of the memory that large signals use again: in tensors, and idle.
std::vector<int64_t> pool_bytes() {
  std::vector<int64_t> bytes(2);
  dfa::pool_bytes(bytes[0], bytes[1]);
  return bytes;
}

// Frees that which is idle, and kept entries; returns the bytes.
int64_t empty_pool() { return dfa::empty_pool() + dfa::drop_kept(); }

// The instruction set in use. A name forces that one, "" returns to the automatic choice.
std::string cpu_isa(std::optional<std::string> force) {
  if (force.has_value()) {
    check(dfa::force_kernels(force->c_str()),
          "cpu_isa: force must be avx512_bf16, avx512, avx2 or portable and run on this CPU, got ",
          *force);
  }
  return dfa::kernels().name;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfa_kernels, CPU, m) {
  m.impl("project.cpp", TORCH_BOX(&project));
  m.impl("structured_adjoint.cpp", TORCH_BOX(&structured_adjoint));
}

// No tensor argument: there is no backend to dispatch on. This key goes before
// CompositeExplicitAutograd, where Python has the kernels that load this library.
STABLE_TORCH_LIBRARY_IMPL(dfa_kernels, CompositeExplicitAutogradNonFunctional, m) {
  m.impl("feedback_matrix.cpp", TORCH_BOX(&feedback_matrix));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("pool_bytes", TORCH_BOX(&pool_bytes));
  m.impl("empty_pool", TORCH_BOX(&empty_pool));
}

// `import dfa_kernels._C` loads the library and so makes the registrations above. The module itself
// is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
