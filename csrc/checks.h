// Checks the operators' arguments and allocates their outputs, for every compiled backend. The
// Python package makes the same checks with the same texts (dfa_kernels/checks.py); these serve
// those who call the operators directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan.h"
#include "projection.h"

namespace dfa {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxColumns = int64_t{1} << 34;
constexpr uint64_t kMaxRows = uint64_t{1} << 63;
constexpr int64_t kMaxInteger = std::numeric_limits<int64_t>::max();

// Throws unless it holds. STD_TORCH_CHECK would put this file's path into the message.
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// As Python prints it.
inline std::string name(ScalarType type) {
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

inline void check_integer(int64_t value, int64_t low, int64_t high, const char* op,
                          const char* argument) {
  check(low <= value && value <= high, op, ": ", argument, " must be in [", low, ", ", high,
        "], got ", value);
}

inline void check_element(int64_t value, int64_t low, const char* op, const char* argument,
                          size_t index) {
  check(low <= value, op, ": ", argument, "[", index, "] must be in [", low, ", ", kMaxInteger,
        "], got ", value);
}

inline Type type_of(ScalarType type, const char* op, const char* argument) {
  switch (type) {
    case ScalarType::Float:
      return Type::kFloat32;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Half:
      return Type::kFloat16;
    case ScalarType::Double:
      return Type::kFloat64;
    default:
      check(false, op, ": ", argument, " must be float16, bfloat16, float32 or float64, got ",
            name(type));
  }
  return Type::kFloat32;
}

inline Distribution distribution_of(const std::string& name, const char* op) {
  for (int i = 0; i < kDistributions; ++i) {
    if (name == facts(Distribution(i)).name) return Distribution(i);
  }
  std::string names;
  for (int i = 0; i < kDistributions; ++i) {
    names += (i == 0 ? "'" : ", '") + std::string(facts(Distribution(i)).name) + "'";
  }
  check(false, op, ": distribution must be one of ", names, ", got '", name, "'");
  return Distribution::kNormal;
}

inline Stream stream_of(int64_t seed, int64_t column_offset, int64_t columns,
                        Distribution distribution, const char* op) {
  check_integer(column_offset, 0, kMaxColumns, op, "column_offset");
  check(columns <= kMaxColumns - column_offset, op,
        ": column_offset must leave the columns below 2**34, got ", column_offset, " with ",
        columns, " columns");
  return {static_cast<uint64_t>(seed), distribution, column_offset};
}

inline Stream stream_of(int64_t seed, int64_t column_offset, int64_t columns,
                        const std::string& distribution, const char* op) {
  return stream_of(seed, column_offset, columns, distribution_of(distribution, op), op);
}

inline void check_rows(int64_t row_offset, int64_t rows, const char* op, const char* argument) {
  check(static_cast<uint64_t>(row_offset) + static_cast<uint64_t>(rows) <= kMaxRows, op, ": ",
        argument, " must leave the rows below 2**63, got ", row_offset, " with ", rows, " rows");
}

// Refuses sizes whose bytes overflow int64. Smaller ones are left to the allocator.
inline void check_fits(int64_t rows, int64_t columns, const char* op) {
  constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / 16;
  check(rows == 0 || columns <= kMaxElements / rows, op, ": output must fit in memory, got [", rows,
        ", ", columns, "]");
}

// Refuses a scale that fp32 arithmetic cannot hold, by itself or with the distribution's factor.
inline void check_scale(double scale, double factor, Type error_type, const char* op,
                        size_t index) {
  if (error_type == Type::kFloat64 || scale == 0) return;
  using Limits = std::numeric_limits<float>;
  const double low = Limits::min() / std::min(factor, 1.0);
  const double high = Limits::max() / std::max(factor, 1.0);
  const double size = std::abs(scale);
  check(low <= size && size <= high, op, ": scales[", index, "] must be 0 or between ", low,
        " and ", high, " in size unless the error is torch.float64, got ", scale);
}

// A new [rows, columns] tensor, or none if there is no memory for it.
inline std::optional<Tensor> new_matrix(int64_t rows, int64_t columns, ScalarType dtype,
                                        torch::stable::Device device, const char* op) {
  check_fits(rows, columns, op);
  try {
    return torch::stable::empty(std::vector<int64_t>{rows, columns}, dtype, std::nullopt, device);
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

// The arguments of `project`, checked. The layers have no outputs yet.
struct ProjectArguments {
  Stream stream;
  Type error_type;
  ScalarType out_dtype;
  Type out_type;
  std::vector<Layer> layers;
};

inline void check_error(const Tensor& error) {
  check(error.dim() == 2, "project: error must have 2 dimensions, got ", error.dim());
}

inline ProjectArguments check_project(const Tensor& error, const std::vector<int64_t>& row_offsets,
                                      const std::vector<int64_t>& sizes,
                                      const std::vector<double>& scales, const Stream& stream,
                                      std::optional<ScalarType> dtype) {
  const char* const op = "project";
  check(row_offsets.size() == sizes.size(), op, ": row_offsets must have one entry per size (",
        sizes.size(), "), got ", row_offsets.size());
  check(scales.size() == sizes.size(), op, ": scales must have one entry per size (", sizes.size(),
        "), got ", scales.size());
  ProjectArguments checked{};
  checked.error_type = type_of(error.scalar_type(), op, "error");
  checked.out_dtype = dtype.value_or(error.scalar_type());
  checked.out_type = type_of(checked.out_dtype, op, "dtype");
  checked.stream = stream;
  const double factor = facts(stream.distribution).factor;
  checked.layers.reserve(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    check_element(sizes[i], 1, op, "sizes", i);
    check_element(row_offsets[i], 0, op, "row_offsets", i);
    check_rows(row_offsets[i], sizes[i], op, "row_offsets");
    check_fits(error.size(0), sizes[i], op);
    check_scale(scales[i], factor, checked.error_type, op, i);
    checked.layers.push_back(
        {static_cast<uint64_t>(row_offsets[i]), sizes[i], scales[i] * factor, nullptr});
  }
  return checked;
}

inline ProjectArguments check_project(const Tensor& error, const std::vector<int64_t>& row_offsets,
                                      const std::vector<int64_t>& sizes,
                                      const std::vector<double>& scales, int64_t seed,
                                      int64_t column_offset, const std::string& distribution,
                                      std::optional<ScalarType> dtype) {
  check_error(error);
  const Stream stream = stream_of(seed, column_offset, error.size(1), distribution, "project");
  return check_project(error, row_offsets, sizes, scales, stream, dtype);
}

// Layers and stream in one tensor, which an operator reads faster than lists: int64, contiguous,
// [seed, column_offset, distribution, row_offsets.., sizes.., bits of the scales..].
inline ProjectArguments check_project(const Tensor& error, const Tensor& packed,
                                      std::optional<ScalarType> dtype) {
  constexpr int64_t kStream = 3;
  const char* const op = "project";
  check_error(error);
  const int64_t numbers = packed.dim() == 1 ? packed.size(0) - kStream : -1;
  check(numbers >= 0 && numbers % 3 == 0 && packed.scalar_type() == ScalarType::Long &&
            packed.is_contiguous() && packed.device().type() == DeviceType::CPU,
        op, ": packed must be int64, contiguous, on the CPU and of length 3 + 3 * layers");
  const auto* const given = static_cast<const int64_t*>(packed.const_data_ptr());
  const int64_t *const row_offsets = given + kStream, *const sizes = row_offsets + numbers / 3;
  const int64_t *const bits = sizes + numbers / 3, *const end = bits + numbers / 3;
  check_integer(given[2], 0, kDistributions - 1, op, "packed[2]");
  std::vector<double> scales(static_cast<size_t>(end - bits));
  if (!scales.empty()) std::memcpy(scales.data(), bits, scales.size() * sizeof(double));
  const Distribution distribution{static_cast<int>(given[2])};
  return check_project(error, {row_offsets, sizes}, {sizes, bits}, scales,
                       stream_of(given[0], given[1], error.size(1), distribution, op), dtype);
}

// The arguments of `structured_adjoint`, checked. Torch itself refuses an empty list.
struct AdjointArguments {
  Stream stream;
  std::vector<Layer> layers;  // `out` is a contiguous signal
  Type in_type;
  int64_t batch;
};

// `contiguous` gets the tensors that the layers point to.
inline AdjointArguments check_adjoint(const std::vector<Tensor>& signals,
                                      const std::vector<int64_t>& row_offsets,
                                      const std::vector<double>& scales, int64_t seed,
                                      int64_t column_offset, const std::string& distribution,
                                      int64_t columns, std::vector<Tensor>& contiguous) {
  const char* const op = "project_adjoint";
  check(row_offsets.size() == signals.size() && scales.size() == signals.size(), op,
        ": row_offsets and scales must have one entry per signal (", signals.size(), "), got ",
        row_offsets.size(), " and ", scales.size());
  AdjointArguments checked{};
  checked.stream = stream_of(seed, column_offset, columns, distribution, op);
  check(checked.stream.distribution == Distribution::kHadamard, op,
        ": distribution must be structured for this operator, got '", distribution, "'");
  checked.in_type = type_of(signals[0].scalar_type(), op, "signals");
  check(signals[0].dim() == 2, op, ": signals[0] must be [batch, size], got ", signals[0].dim(),
        " dimensions");
  checked.batch = signals[0].size(0);
  for (size_t i = 0; i < signals.size(); ++i) {
    const Tensor& signal = signals[i];
    check(signal.dim() == 2 && signal.size(0) == checked.batch &&
              signal.scalar_type() == signals[0].scalar_type() &&
              signal.device() == signals[0].device(),
          op, ": signals[", i, "] must be [", checked.batch,
          ", size] and of the dtype and device of the others");
    check_element(row_offsets[i], 0, op, "row_offsets", i);
    check_rows(row_offsets[i], signal.size(1), op, "row_offsets");
    contiguous.push_back(signal.is_contiguous() ? signal : torch::stable::contiguous(signal));
    checked.layers.push_back({static_cast<uint64_t>(row_offsets[i]), signal.size(1), scales[i],
                              const_cast<void*>(contiguous.back().const_data_ptr())});
  }
  // By the scales themselves: with the factor, subnormal ones may be equal.
  std::stable_sort(checked.layers.begin(), checked.layers.end(), comes_before);
  for (Layer& layer : checked.layers) layer.scale *= facts(checked.stream.distribution).factor;
  return checked;
}

// Checks every argument of `feedback_matrix` but its device and dtype.
inline Stream check_feedback_matrix(int64_t rows, int64_t columns, int64_t seed, int64_t row_offset,
                                    int64_t column_offset, const std::string& distribution) {
  const char* const op = "feedback_matrix";
  check_integer(rows, 0, kMaxInteger, op, "rows");
  check_integer(columns, 0, kMaxColumns, op, "columns");
  check_integer(row_offset, 0, kMaxInteger, op, "row_offset");
  check_rows(row_offset, rows, op, "row_offset");
  return stream_of(seed, column_offset, columns, distribution, op);
}

}  // namespace dfa
