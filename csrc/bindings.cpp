// Registration with PyTorch's stable ABI, and the checks of the op boundary. The schemas are
// defined by the Python package (ops.py), which loads this library afterwards.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "projection.h"

namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxColumns = int64_t{1} << 34;
constexpr uint64_t kMaxRows = uint64_t{1} << 63;
constexpr int64_t kMaxInteger = std::numeric_limits<int64_t>::max();

// STD_TORCH_CHECK would put this file's path into the user's message.
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// As Python writes it.
std::string name(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default:
      return torch::headeronly::toString(type);
  }
}

// The texts of this and the checks below are those of dfa_kernels/checks.py.
void check_integer(int64_t value, int64_t low, int64_t high, const char* op, const char* argument) {
  check(low <= value && value <= high, op, ": ", argument, " must be in [", low, ", ", high,
        "], got ", value);
}

void check_element(int64_t value, int64_t low, const char* op, const char* argument, size_t index) {
  check(low <= value, op, ": ", argument, "[", index, "] must be in [", low, ", ", kMaxInteger,
        "], got ", value);
}

dfa::Type type_of(ScalarType type, const char* op, const char* argument) {
  switch (type) {
    case ScalarType::Float:
      return dfa::Type::kFloat32;
    case ScalarType::BFloat16:
      return dfa::Type::kBFloat16;
    case ScalarType::Half:
      return dfa::Type::kFloat16;
    case ScalarType::Double:
      return dfa::Type::kFloat64;
    default:
      check(false, op, ": ", argument, " must be float16, bfloat16, float32 or float64, got ",
            name(type));
  }
  return dfa::Type::kFloat32;
}

dfa::Stream stream_of(int64_t seed, int64_t column_offset, int64_t columns,
                      const std::string& distribution, const char* op) {
  check_integer(column_offset, 0, kMaxColumns, op, "column_offset");
  check(columns <= kMaxColumns - column_offset, op,
        ": column_offset must leave the columns below 2**34, got ", column_offset, " with ",
        columns, " columns");
  dfa::Stream stream{static_cast<uint64_t>(seed), dfa::Distribution::kNormal, column_offset};
  if (distribution == "normal") return stream;
  stream.distribution = dfa::Distribution::kUniform;
  if (distribution == "uniform") return stream;
  stream.distribution = dfa::Distribution::kRademacher;
  check(distribution == "rademacher", op,
        ": distribution must be one of 'normal', 'uniform', 'rademacher', got '", distribution,
        "'");
  return stream;
}

void check_rows(int64_t row_offset, int64_t rows, const char* op, const char* argument) {
  check(static_cast<uint64_t>(row_offset) + static_cast<uint64_t>(rows) <= kMaxRows, op, ": ",
        argument, " must leave the rows below 2**63, got ", row_offset, " with ", rows, " rows");
}

// A size the allocator can be asked for; beyond it, arithmetic on sizes would overflow first.
Tensor allocate(int64_t rows, int64_t columns, ScalarType dtype, const char* op) {
  constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / 16;
  check(rows == 0 || columns <= kMaxElements / rows, op, ": output must fit in memory, got [", rows,
        ", ", columns, "]");
  try {
    Tensor out = torch::stable::empty(std::vector<int64_t>{rows, columns}, dtype);
    dfa::advise_huge_pages(out.mutable_data_ptr(),
                           rows * columns * static_cast<int64_t>(out.element_size()));
    return out;
  } catch (const std::exception&) {
    check(false, op, ": output must fit in memory, got [", rows, ", ", columns, "]");
  }
  return Tensor();
}

std::vector<Tensor> project(const Tensor& error, const std::vector<int64_t>& row_offsets,
                            const std::vector<int64_t>& sizes, const std::vector<double>& scales,
                            int64_t seed, int64_t column_offset, const std::string& distribution,
                            std::optional<ScalarType> dtype) {
  const char* const op = "project";
  check(error.dim() == 2, op, ": error must have 2 dimensions, got ", error.dim());
  check(row_offsets.size() == sizes.size(), op, ": row_offsets must have one entry per size (",
        sizes.size(), "), got ", row_offsets.size());
  check(scales.size() == sizes.size(), op, ": scales must have one entry per size (", sizes.size(),
        "), got ", scales.size());
  const dfa::Type error_type = type_of(error.scalar_type(), op, "error");
  const ScalarType out_dtype = dtype.value_or(error.scalar_type());
  const dfa::Type out_type = type_of(out_dtype, op, "dtype");
  const int64_t rows = error.size(0), columns = error.size(1);
  const dfa::Stream stream = stream_of(seed, column_offset, columns, distribution, op);
  for (size_t i = 0; i < sizes.size(); ++i) {
    check_element(sizes[i], 1, op, "sizes", i);
    check_element(row_offsets[i], 0, op, "row_offsets", i);
    check_rows(row_offsets[i], sizes[i], op, "row_offsets");
  }

  const Tensor contiguous = error.is_contiguous() ? error : torch::stable::contiguous(error);
  const double unit =
      stream.distribution == dfa::Distribution::kUniform ? dfa::kSqrt3 : 1.0;  // of the lattice
  std::vector<Tensor> outputs;
  std::vector<dfa::Range> ranges;
  outputs.reserve(sizes.size());
  ranges.reserve(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    outputs.push_back(allocate(rows, sizes[i], out_dtype, op));
    ranges.push_back({static_cast<uint64_t>(row_offsets[i]), sizes[i], scales[i] * unit,
                      outputs.back().mutable_data_ptr()});
  }
  if (rows == 0) return outputs;
  dfa::project_cpu(stream, {contiguous.const_data_ptr(), rows, columns, error_type},
                   std::move(ranges), out_type);
  return outputs;
}

Tensor feedback_matrix(int64_t rows, int64_t columns, int64_t seed, int64_t row_offset,
                       int64_t column_offset, const std::string& distribution, ScalarType dtype,
                       torch::stable::Device device) {
  const char* const op = "feedback_matrix";
  check(device.type() == DeviceType::CPU, op, ": device must be cpu for backend cpp");
  check_integer(rows, 0, kMaxInteger, op, "rows");
  check_integer(columns, 0, kMaxColumns, op, "columns");
  check_integer(row_offset, 0, kMaxInteger, op, "row_offset");
  check_rows(row_offset, rows, op, "row_offset");
  const dfa::Type type = type_of(dtype, op, "dtype");
  const dfa::Stream stream = stream_of(seed, column_offset, columns, distribution, op);
  Tensor out = allocate(rows, columns, dtype, op);
  dfa::feedback_matrix_cpu(stream, static_cast<uint64_t>(row_offset), rows, columns, type,
                           out.mutable_data_ptr());
  return out;
}

// The instruction set in use; a name forces it, "" returns to the automatic choice.
std::string cpu_isa(std::optional<std::string> force) {
  if (force.has_value()) {
    check(dfa::force_kernels(force->c_str()),
          "cpu_isa: force must be avx512, avx2 or portable and run on this CPU, got ", *force);
  }
  return dfa::kernels().name;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfa_kernels, CPU, m) { m.impl("project.cpp", TORCH_BOX(&project)); }

// No tensor argument: there is no backend to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(dfa_kernels, CompositeExplicitAutograd, m) {
  m.impl("feedback_matrix.cpp", TORCH_BOX(&feedback_matrix));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

// `import dfa_kernels._C` loads the library; the registrations above are its only content.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
