// The projection: tiles of U small enough for the cache are made by SIMD and multiplied where they
// lie, by the thread that made them. U exists nowhere else.
//
// Workspace, whatever the layers, the error and their number: at most kPackedBytes of packed error,
// plus kAccumulatorBytes of partial sums if not all of the error fits there, plus about 1.5 MiB per
// thread.
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <new>

#include "../plan.h"
#include "kernels.h"
#include "pack.h"

namespace dfa {
namespace {

constexpr int64_t kErrorRows = 4096;  // rows of error per pass over U
constexpr int64_t kTileUnits = 64;    // column units per tile: 512 columns
constexpr int64_t kTaskPanels = 4;    // panels that share a block of error rows in L1
constexpr int64_t kPackedBytes = 16 << 20;
constexpr int64_t kAccumulatorBytes = 16 << 20;
constexpr int64_t kThreadAccumulatorBytes = 512 << 10;
// Signals that are larger than this together are written past the caches. One that is larger than
// the second is not: the C library maps its memory anew, and the system has just put its zeros
// there.
constexpr int64_t kCachedBytes = 64 << 20;
constexpr int64_t kMappedBytes = 32 << 20;
constexpr double kSerialWork = 4e5;  // multiplications below which a second thread costs more

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<char, AlignedDelete>;

Buffer allocate(int64_t bytes) {
  return Buffer(
      static_cast<char*>(::operator new(static_cast<size_t>(bytes + 64), std::align_val_t(64))));
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs work(index, worker) for every index on torch's threads, each taking the next index when
// free.
template <class Work>
void run_parallel(int64_t count, int64_t workers, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto drain = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < count; i = next++) work(i, worker);
    }
  };
  if (workers == 1) return drain(0, 1);
  torch::stable::parallel_for(0, workers, 1, drain);
}

// What the types of the error decide.
struct Arithmetic {
  int columns;    // columns in one packed element: 2 for bf16 pairs
  int64_t bytes;  // of one packed element
  int64_t acc_bytes;
  int max_block;
  bool pairs;
  MultiplyKernel multiply;
  ScaleKernel scale;
  PackKernel pack;
};

Arithmetic arithmetic(const Kernels& k, Type error, Type out) {
  const int o = static_cast<int>(out);
  if (error == Type::kFloat64) {
    return {1, 8, 8, k.max_block_f64, false, k.multiply_f64, k.scale_f64[o], pack<double, double>};
  }
  if (error == Type::kBFloat16 && k.multiply_bf16 != nullptr) {
    return {2, 4, 4, k.max_block_f32, true, k.multiply_bf16, k.scale_f32[o], pack_pairs};
  }
  const PackKernel pack_f32 = error == Type::kFloat32    ? pack<float, float>
                              : error == Type::kBFloat16 ? pack<BFloat16Source, float>
                                                         : pack<HalfSource, float>;
  return {1, 4, 4, k.max_block_f32, false, k.multiply_f32, k.scale_f32[o], pack_f32};
}

class Projection {
 public:
  Projection(const Stream& stream, const ErrorMatrix& error, std::vector<Range> ranges, Type out)
      : stream_(stream),
        error_(error),
        out_bytes_(type_bytes(out)),
        kernels_(kernels()),
        math_(arithmetic(kernels_, error.type, out)),
        plan_(std::move(ranges)) {
    head_ = stream.column_offset % kUnitColumns;
    first_unit_ = stream.column_offset / kUnitColumns;
    const int64_t units = std::max<int64_t>(1, divide_up(head_ + error.columns, kUnitColumns));
    tiles_ = divide_up(units, kTileUnits);
    tile_units_ = divide_up(units, tiles_);  // evened out
    tiles_ = divide_up(units, tile_units_);
    units_ = units;
    past_caches_ = plan_.written() * error.rows * out_bytes_ > kCachedBytes;
  }

  void run() {
    for (first_row_ = 0; first_row_ < error_.rows; first_row_ += kErrorRows) {
      rows_ = std::min(kErrorRows, error_.rows - first_row_);
      run_rows();
    }
  }

 private:
  // Packed elements [begin, end) of a tile's columns, counted from the tile's first column: the
  // columns of U before and after the error's are skipped.
  struct Depth {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
  };
  Depth depth(int64_t tile) const {
    const int64_t first = tile * tile_units_ * kUnitColumns;
    const int64_t last = std::min((tile + 1) * tile_units_, units_) * kUnitColumns;
    const int64_t begin = std::max(first, head_), end = std::min(last, head_ + error_.columns);
    return {(begin - first) / math_.columns, divide_up(end - first, math_.columns)};
  }
  int64_t tile_depth() const { return tile_units_ * kUnitColumns / math_.columns; }

  void run_rows() {
    blocks_ = divide_up(rows_, math_.max_block);
    const double work = static_cast<double>(plan_.rows()) * static_cast<double>(error_.columns) *
                        static_cast<double>(rows_ + 8);
    threads_ = work < kSerialWork ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());

    const int64_t packed_tile = rows_ * tile_depth() * math_.bytes;
    const int64_t window = std::min(tiles_, std::max<int64_t>(1, kPackedBytes / packed_tile));
    const bool resident = window == tiles_;
    const int64_t panel_acc = rows_ * kernels_.panel * math_.acc_bytes;

    // Panels per task: as many as keep the partial sums in L2 and every thread busy; more where
    // many layers share them, so that each is written in longer runs.
    const bool shared = plan_.written() > 4 * plan_.rows();
    task_panels_ =
        std::min((shared ? 2 : 1) * kTaskPanels, plan_.rows() / (kernels_.panel * threads_ * 4));
    if (tiles_ > 1) task_panels_ = std::min(task_panels_, kThreadAccumulatorBytes / panel_acc);
    if (!resident) task_panels_ = 1;
    task_panels_ = std::max<int64_t>(1, task_panels_);
    task_rows_ = task_panels_ * kernels_.panel;
    plan_.cut(task_rows_);
    const int64_t workers = std::min(threads_, plan_.tasks());

    // Partial sums live with the thread while all tiles of a task follow one another, else with the
    // task.
    const int64_t acc_rows = tiles_ > 1 ? rows_ : math_.max_block;
    task_acc_ = acc_rows * task_rows_ * math_.acc_bytes;
    const int64_t group =
        resident ? plan_.tasks()
                 : std::min(plan_.tasks(), std::max<int64_t>(1, kAccumulatorBytes / task_acc_));
    const int64_t panel_bytes = tile_depth() * kernels_.panel * 4;
    thread_tile_ = task_panels_ * panel_bytes;
    tile_buffer_ = allocate(workers * thread_tile_);
    acc_buffer_ = allocate((resident ? workers : group) * task_acc_);
    packed_buffer_ = allocate(window * packed_tile);

    for (int64_t task = 0; task < plan_.tasks(); task += group) {
      const int64_t count = std::min(group, plan_.tasks() - task);
      for (int64_t tile = 0; tile < tiles_; tile += window) {
        const int64_t end = std::min(tile + window, tiles_);
        pack_tiles(tile, end);
        run_parallel(count, workers, [&](int64_t i, int64_t worker) {
          run_task(plan_.task(task + i), tile, end, tile_buffer_.get() + worker * thread_tile_,
                   acc_buffer_.get() + (resident ? worker : i) * task_acc_);
        });
      }
    }
  }

  // Error rows of block b; blocks are evened out so that none is left with a single row.
  int64_t block_begin(int64_t block) const { return block * rows_ / blocks_; }

  char* packed(int64_t tile, int64_t window_begin, int64_t block) const {
    return packed_buffer_.get() + ((tile - window_begin) * tile_depth() * rows_ +
                                   depth(tile).size() * block_begin(block)) *
                                      math_.bytes;
  }

  void pack_tiles(int64_t begin, int64_t end) {
    const int64_t count = (end - begin) * blocks_;
    run_parallel(count, std::min(threads_, divide_up(count, 8)), [&](int64_t i, int64_t) {
      const int64_t tile = begin + i / blocks_, block = i % blocks_;
      const Depth d = depth(tile);
      const int64_t row = block_begin(block);
      PackSpec spec{};
      spec.error = &error_;
      spec.row = first_row_ + row;
      spec.block = static_cast<int>(block_begin(block + 1) - row);
      spec.column = tile * tile_units_ * kUnitColumns + d.begin * math_.columns - head_;
      spec.depth = d.size();
      spec.out = packed(tile, begin, block);
      math_.pack(spec);
    });
  }

  void make_tile(const RowPlan::Task& task, int64_t tile, char* tile_buffer) const {
    TileSpec spec{};
    spec.seed = stream_.seed;
    spec.distribution = stream_.distribution;
    spec.unit = first_unit_ + tile * tile_units_;
    spec.units = std::min(tile_units_, units_ - tile * tile_units_);
    const int64_t panel_elements = tile_depth() * kernels_.panel;
    for (int64_t row = 0; row < task.rows; row += kernels_.panel) {
      spec.row = task.row + static_cast<uint64_t>(row);
      char* panel = tile_buffer + row / kernels_.panel * panel_elements * 4;
      if (math_.pairs) {
        kernels_.tile_bf16(spec, reinterpret_cast<uint32_t*>(panel));
      } else {
        kernels_.tile_f32(spec, reinterpret_cast<float*>(panel));
      }
    }
  }

  void run_task(const RowPlan::Task& task, int64_t tile_begin, int64_t tile_end, char* tile_buffer,
                char* acc_buffer) const {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      make_tile(task, tile, tile_buffer);
      const Depth d = depth(tile);
      MultiplySpec spec{};
      spec.depth = d.size();
      spec.acc_stride = task_rows_;
      spec.accumulate = tile > 0;
      for (int64_t block = 0; block < blocks_; ++block) {
        const int64_t row = block_begin(block);
        char* acc = acc_buffer + (tiles_ > 1 ? row : 0) * task_rows_ * math_.acc_bytes;
        spec.error = packed(tile, tile_begin, block);
        spec.block = static_cast<int>(block_begin(block + 1) - row);
        for (int64_t r = 0; r < task.rows; r += kernels_.panel) {
          spec.tile = tile_buffer + (r * tile_depth() + d.begin * kernels_.panel) * 4;
          spec.acc = acc + r * math_.acc_bytes;
          math_.multiply(spec);
        }
        if (tile + 1 == tiles_) scale_layers(task, row, spec.block, acc);
      }
    }
  }

  void scale_layers(const RowPlan::Task& task, int64_t row, int block, const char* acc) const {
    plan_.for_each_layer(task, [&](const Range& range, uint64_t begin, uint64_t end) {
      ScaleSpec spec{};
      spec.acc = acc + static_cast<int64_t>(begin - task.row) * math_.acc_bytes;
      spec.acc_stride = task_rows_;
      const int64_t first = static_cast<int64_t>(begin - range.row_offset);
      spec.out =
          static_cast<char*>(range.out) + ((first_row_ + row) * range.size + first) * out_bytes_;
      spec.out_stride = range.size;
      spec.rows = block;
      spec.columns = static_cast<int64_t>(end - begin);
      spec.scale = range.scale;
      spec.past_caches = past_caches_ && range.size * error_.rows * out_bytes_ < kMappedBytes;
      math_.scale(spec);
    });
  }

  const Stream stream_;
  const ErrorMatrix error_;
  const int64_t out_bytes_;
  const Kernels& kernels_;
  const Arithmetic math_;
  RowPlan plan_;
  int64_t head_, first_unit_, units_, tiles_, tile_units_;
  int64_t first_row_ = 0, rows_ = 0, blocks_ = 0, threads_ = 1;
  bool past_caches_ = false;
  int64_t task_panels_ = 1, task_rows_ = 1, task_acc_ = 0, thread_tile_ = 0;
  Buffer tile_buffer_, acc_buffer_, packed_buffer_;
};

}  // namespace

void project_cpu(const Stream& stream, const ErrorMatrix& error, std::vector<Range> ranges,
                 Type out_type) {
  Projection(stream, error, std::move(ranges), out_type).run();
}

}  // namespace dfa
