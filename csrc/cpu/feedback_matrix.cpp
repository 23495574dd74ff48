#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels.h"

namespace dfa {

void feedback_matrix_cpu(const Stream& stream, uint64_t row_offset, int64_t rows, int64_t columns,
                         Type type, void* out) {
  if (rows == 0 || columns == 0) return;
  if (stream.distribution == Distribution::kHadamard) {
    return feedback_matrix_structured_cpu(stream, row_offset, rows, columns, type, out);
  }
  const FillKernel fill = kernels().fill[static_cast<int>(type)];
  // A piece of work is a strip of whole rows, or a part of one row, of about this many entries.
  constexpr int64_t kStripEntries = 1 << 16;
  const int64_t strip_columns = std::min<int64_t>(columns, kStripEntries);
  const int64_t strip_rows = std::max<int64_t>(1, kStripEntries / strip_columns);
  const int64_t across = divide_up(columns, strip_columns);
  const int64_t down = divide_up(rows, strip_rows);
  torch::stable::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t row = strip / across * strip_rows, column = strip % across * strip_columns;
      FillSpec spec{};
      spec.seed = stream.seed;
      spec.distribution = stream.distribution;
      spec.row = row_offset + static_cast<uint64_t>(row);
      spec.rows = std::min(strip_rows, rows - row);
      spec.column = stream.column_offset + column;
      spec.columns = std::min(strip_columns, columns - column);
      spec.out = static_cast<char*>(out) + (row * columns + column) * type_bytes(type);
      spec.out_stride = columns;
      fill(spec);
    }
  });
}

}  // namespace dfa
