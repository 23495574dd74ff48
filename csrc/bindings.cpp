// Registration with PyTorch's stable ABI. The Python package defines the schemas (ops.py) before it
// loads this library.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>
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

// A block of the pool, cut into as many parts as tensors are made of it.
class Shared {
 public:
  Shared(int64_t bytes, int64_t parts) : block_(dfa::take_block(bytes, parts)), left_(parts) {
    if (block_ != nullptr) next_ = static_cast<char*>(dfa::data_of(block_));
  }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  ~Shared() {
    if (block_ == nullptr) return;
    while (left_-- > 0) dfa::give_block(nullptr, block_);
  }

  explicit operator bool() const { return block_ != nullptr; }
  int64_t left() const { return left_; }

  // The next part as a tensor, [rows, columns].
  Tensor tensor(int64_t rows, int64_t columns, int32_t dtype, int64_t bytes, const char* op) {
    const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
    AtenTensorHandle made;
    const AOTITorchError status =
        torch_from_blob(next_, 2, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), -1, &made,
                        aoti_torch_layout_strided(), nullptr, 0, dfa::give_block, block_);
    check(status == AOTI_TORCH_SUCCESS, op, ": cannot make a tensor of ", bytes, " bytes");
    next_ += dfa::part_bytes(bytes);
    --left_;
    return Tensor(made);
  }

 private:
  dfa::Block* const block_;
  char* next_ = nullptr;
  int64_t left_;
};

// A small tensor, [rows, columns], without a way through torch's dispatcher.
Tensor allocate_small(int64_t rows, int64_t columns, int32_t dtype, const char* op) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle made;
  const AOTITorchError status =
      aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), -1, &made);
  check(status == AOTI_TORCH_SUCCESS, op, ": output must fit in memory, got [", rows, ", ", columns,
        "]");
  return Tensor(made);
}

std::atomic<bool> fill{false};

// New tensors [rows, columns], one for each number of columns. Large ones have a block of the pool
// each. Small ones share blocks, unless together they are not worth it.
std::vector<Tensor> allocate_signals(int64_t rows, const std::vector<int64_t>& all_columns,
                                     ScalarType dtype, const char* op) {
  const int64_t element = dfa::type_bytes(dfa::type_of(dtype, op, "dtype"));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int64_t small_bytes = 0;
  for (const int64_t columns : all_columns) {
    dfa::check_fits(rows, columns, op);
    const int64_t bytes = rows * columns * element;
    if (bytes < dfa::kLargeBytes) small_bytes += dfa::part_bytes(bytes);
  }
  const bool pooled = torch_from_blob != nullptr;
  bool sharing = pooled && small_bytes >= dfa::kPooledBytes;
  std::optional<Shared> shared;
  // One for the next small tensors, from tensor i on, of at most kSharedBytes.
  const auto share = [&](size_t i) {
    int64_t parts = 0, sum = 0;
    for (; i < all_columns.size(); ++i) {
      const int64_t bytes = rows * all_columns[i] * element;
      if (bytes >= dfa::kLargeBytes) continue;
      if (sum + dfa::part_bytes(bytes) > dfa::kSharedBytes) break;
      sum += dfa::part_bytes(bytes);
      ++parts;
    }
    shared.emplace(sum, parts);
    sharing = static_cast<bool>(*shared);
  };
  std::vector<Tensor> made;
  made.reserve(all_columns.size());
  for (size_t i = 0; i < all_columns.size(); ++i) {
    const int64_t columns = all_columns[i], bytes = rows * columns * element;
    if (bytes < dfa::kLargeBytes) {
      if (sharing && (!shared || shared->left() == 0)) share(i);
      made.push_back(sharing ? shared->tensor(rows, columns, code, bytes, op)
                             : allocate_small(rows, columns, code, op));
    } else {
      std::optional<Shared> own;
      if (pooled) own.emplace(bytes, 1);
      made.push_back(own && *own ? own->tensor(rows, columns, code, bytes, op)
                                 : allocate(rows, columns, dtype, op));
    }
    if (fill.load(std::memory_order_relaxed)) {
      std::memset(made.back().mutable_data_ptr(), 0xff, static_cast<size_t>(bytes));
    }
  }
  return made;
}

std::vector<Tensor> project_checked(const Tensor& error, dfa::ProjectArguments checked) {
  const int64_t batch = error.size(0);
  const Tensor contiguous = error.is_contiguous() ? error : torch::stable::contiguous(error);
  dfa::begin_call();
  std::vector<int64_t> sizes;
  sizes.reserve(checked.layers.size());
  for (const dfa::Layer& layer : checked.layers) sizes.push_back(layer.size);
  std::vector<Tensor> outputs = allocate_signals(batch, sizes, checked.out_dtype, "project");
  for (size_t i = 0; i < outputs.size(); ++i) {
    checked.layers[i].out = outputs[i].mutable_data_ptr();
  }
  if (batch == 0) return outputs;
  dfa::project_cpu(checked.stream,
                   {contiguous.const_data_ptr(), batch, error.size(1), checked.error_type},
                   std::move(checked.layers), checked.out_type);
  return outputs;
}

std::vector<Tensor> project(const Tensor& error, const std::vector<int64_t>& row_offsets,
                            const std::vector<int64_t>& sizes, const std::vector<double>& scales,
                            int64_t seed, int64_t column_offset, const std::string& distribution,
                            std::optional<ScalarType> dtype) {
  return project_checked(error, dfa::check_project(error, row_offsets, sizes, scales, seed,
                                                   column_offset, distribution, dtype));
}

std::vector<Tensor> project_packed(const Tensor& error, const Tensor& packed,
                                   std::optional<ScalarType> dtype) {
  return project_checked(error, dfa::check_project(error, packed, dtype));
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
  const Tensor out = allocate_signals(checked.batch, {columns}, dtype, op)[0];
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

// Whether signals are filled with NaN before they are made, so that tests see what is left out.
// Returns whether they were.
bool fill_signals(bool on) { return fill.exchange(on, std::memory_order_relaxed); }

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
  m.impl("project_packed.cpp", TORCH_BOX(&project_packed));
  m.impl("structured_adjoint.cpp", TORCH_BOX(&structured_adjoint));
}

// No tensor argument: there is no backend to dispatch on. This key goes before
// CompositeExplicitAutograd, where Python has the kernels that load this library.
STABLE_TORCH_LIBRARY_IMPL(dfa_kernels, CompositeExplicitAutogradNonFunctional, m) {
  m.impl("feedback_matrix.cpp", TORCH_BOX(&feedback_matrix));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("pool_bytes", TORCH_BOX(&pool_bytes));
  m.impl("empty_pool", TORCH_BOX(&empty_pool));
  m.impl("fill_signals", TORCH_BOX(&fill_signals));
}

// `import dfa_kernels._C` loads the library and so makes the registrations above. The module itself
// is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
