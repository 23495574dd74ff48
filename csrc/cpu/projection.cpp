// The projection. Each thread makes tiles of U that fit the cache and multiplies them there; one
// error or two meet the entries in registers. U exists nowhere else, unless it is small: see
// kept.h.
//
// Tiles are panels of rows, with the rows in the lanes of vectors. Where panels would be mostly
// empty, because layers are of a few rows, tiles are single rows with the columns in the lanes.
// Where few panels meet many columns, threads share the columns: each part of them has sums of its
// own, which are added up in one order. Both follow from the layers and the columns alone, so the
// sums depend on neither the batch nor the number of threads.
//
// The workspace is bounded, independent of the layers and the batch: at most kPackedBytes of packed
// error, kAccumulatorBytes of partial sums if the error does not fit there or threads share its
// columns, and about 1.5 MiB per thread. Small matrices are kept from call to call, at most
// kKeptBytes of them; see kept.h.
#include "../plan.h"
#include "kept.h"
#include "kernels.h"
#include "memory.h"
#include "pack.h"
#include "parallel.h"

namespace dfa {
namespace {

constexpr int64_t kPassBatch = 4096;  // error rows per pass over U
constexpr int64_t kTileUnits = 64;    // column units per tile: 512 columns
constexpr int64_t kTaskPanels = 4;    // panels that share a slice of the batch in L1
// Of products by rows:
constexpr double kRowsPay = 1.5;        // panels would have so many times as many rows
constexpr int64_t kRowsColumns = 64;    // and rows so many columns
constexpr int64_t kRowTileUnits = 256;  // at most
constexpr int64_t kRowUnits = 16;       // tiles are of so many: whole blocks of any distribution
constexpr int64_t kTaskRows = 8;        // that share a slice of the batch
// Threads share the columns of at most kParts panels, in as many parts of at least kPartTiles.
constexpr int64_t kParts = 16;
constexpr int64_t kPartTiles = 4;
constexpr int64_t kPackedBytes = 16 << 20;
constexpr int64_t kAccumulatorBytes = 16 << 20;
constexpr int64_t kThreadAccumulatorBytes = 512 << 10;
// Signals are written past the caches if together they exceed kCachedBytes. One beyond kMappedBytes
// is not if its memory is newly mapped: the system's zeros have just brought it into the caches.
constexpr int64_t kCachedBytes = 16 << 20;
constexpr int64_t kMappedBytes = 32 << 20;
constexpr int64_t kKeptBatch = 128;  // error rows beyond which kept entries do not pay
constexpr int64_t kKeptSlices = 3;   // of the batch, beyond which kept floats are unpacked first
// A second thread pays from so much work on: multiplications, and packed numbers.
constexpr double kSerialWork = 4e5;
constexpr int64_t kSerialPacking = 64 << 10;

// What follows from the types of error and output, and from whether the product goes by rows.
struct Arithmetic {
  int panel;      // rows of U in one
  int columns;    // columns in one packed element: 2 for bf16 pairs
  int64_t bytes;  // of one packed element
  int64_t acc_bytes;
  int max_batch;
  bool pairs;
  bool in_place;  // the error is read where it is, not packed
  bool direct;    // a product can write signals itself
  MultiplyKernel multiply;
  MultiplyKernel multiply_kept;  // of panels of bf16 pairs; may be null
  FusedKernel fused;             // of panels, for at most kFusedBatch errors; may be null
  ScaleKernel scale;
  PackKernel pack;
};

Arithmetic arithmetic(const Kernels& k, Type error, Type out, bool by_rows) {
  const bool wide = error == Type::kFloat64;
  Arithmetic a{};
  a.panel = by_rows ? 1 : k.panel;
  a.pairs = error == Type::kBFloat16 && k.multiply_bf16 != nullptr;
  a.columns = a.pairs ? 2 : 1;
  a.bytes = a.acc_bytes = wide ? 8 : 4;
  a.in_place = by_rows && (wide || error == Type::kFloat32);
  a.direct = !by_rows && out == (wide ? Type::kFloat64 : Type::kFloat32);
  a.scale = (wide ? k.scale_f64 : k.scale_f32)[static_cast<int>(out)];
  a.pack = wide                       ? pack<double, double>
           : a.pairs                  ? pack_pairs
           : error == Type::kFloat32  ? pack<float, float>
           : error == Type::kBFloat16 ? pack<BFloat16, float>
                                      : pack<Half, float>;
  if (by_rows) {
    a.max_batch = kDotBatch;
    a.multiply = wide ? k.dot_f64 : a.pairs ? k.dot_bf16 : k.dot_f32;
  } else {
    a.max_batch = wide ? k.max_batch_f64 : k.max_batch_f32;
    a.multiply = wide ? k.multiply_f64 : a.pairs ? k.multiply_bf16 : k.multiply_f32;
    a.multiply_kept = wide ? nullptr : a.pairs ? k.multiply_bf16 : k.multiply_kept;
    a.fused = wide ? nullptr : a.pairs ? k.fused_bf16 : k.fused_f32;
  }
  return a;
}

class Projection {
 public:
  Projection(const Stream& stream, const ErrorMatrix& error, std::vector<Layer> layers, Type out)
      : stream_(stream),
        error_(error),
        out_bytes_(type_bytes(out)),
        kernels_(kernels()),
        plan_(std::move(layers)) {
    plan_.cut(kernels_.panel);
    const auto in_panels = static_cast<double>(plan_.tasks() * kernels_.panel);
    by_rows_ =
        error.columns >= kRowsColumns && in_panels >= kRowsPay * static_cast<double>(plan_.rows());
    math_ = arithmetic(kernels_, error.type, out, by_rows_);
    head_ = stream.column_offset % kUnitColumns;
    first_unit_ = stream.column_offset / kUnitColumns;
    const int64_t units = std::max<int64_t>(1, divide_up(head_ + error.columns, kUnitColumns));
    tiles_ = divide_up(units, by_rows_ ? kRowTileUnits : kTileUnits);
    tile_units_ = divide_up(units, tiles_);  // evened out
    if (by_rows_) tile_units_ = divide_up(tile_units_, kRowUnits) * kRowUnits;
    tiles_ = divide_up(units, tile_units_);
    units_ = units;
    if (plan_.tasks() <= kParts) parts_ = std::clamp<int64_t>(tiles_ / kPartTiles, 1, kParts);
    find_entries();
    past_caches_ = plan_.written() * error.batch * out_bytes_ > kCachedBytes;
    if (!past_caches_) return;
    for (const Layer& layer : plan_.layers()) used_again_ |= is_used_again(layer.out);
  }

  void run() {
    for (pass_begin_ = 0; pass_begin_ < error_.batch; pass_begin_ += kPassBatch) {
      batch_ = std::min(kPassBatch, error_.batch - pass_begin_);
      run_pass();
    }
    if (kept_.entries != nullptr && !kept_.made) keep(key_, kept_.entries);
  }

 private:
  // Packed elements [begin, end) of a tile, counted from its first column. The columns of U before
  // and after the error's are skipped.
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

  // Entries that are kept, or are to be: by panels, to which the plan is cut, and by tiles in
  // those.
  void find_entries() {
    const int64_t bytes = plan_.tasks() * tiles_ * kept_tile_bytes();
    if (math_.multiply_kept == nullptr || stream_.distribution != Distribution::kNormal ||
        error_.batch > kKeptBatch || bytes == 0 || bytes > kKeptMatrixBytes) {
      return;
    }
    key_ = {&kernels_, stream_.seed, stream_.distribution, first_unit_, units_, {}};
    for (const RowPlan::Interval& interval : plan_.intervals()) {
      key_.rows.push_back({interval.row, interval.rows, interval.first_task});
    }
    kept_ = find_kept(key_, bytes);
  }
  int64_t kept_tile_bytes() const { return tile_units_ * kUnitColumns * math_.panel * 2; }

  // The panel of a tile that begins at `row`.
  char* kept_panel(uint64_t row, int64_t tile) const {
    const auto after =
        std::upper_bound(key_.rows.begin(), key_.rows.end(), row,
                         [](uint64_t row, const KeptRows& rows) { return row < rows.row; });
    const KeptRows& rows = *(after - 1);
    const int64_t panel = rows.panel + static_cast<int64_t>(row - rows.row) / math_.panel;
    return kept_.entries.get() + (panel * tiles_ + tile) * kept_tile_bytes();
  }

  void run_pass() {
    slices_ = divide_up(batch_, math_.max_batch);
    fused_ = math_.fused != nullptr && batch_ <= kFusedBatch && kept_.entries == nullptr;
    const double work = static_cast<double>(plan_.rows()) * static_cast<double>(error_.columns) *
                        static_cast<double>(batch_ + 8);
    threads_ = work < kSerialWork ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());

    const int64_t packed_tile = math_.in_place ? 0 : batch_ * tile_depth() * math_.bytes;
    const int64_t window = math_.in_place
                               ? tiles_
                               : std::min(tiles_, std::max<int64_t>(1, kPackedBytes / packed_tile));
    const bool resident = window == tiles_;
    const int64_t panel_acc = batch_ * math_.panel * math_.acc_bytes;

    // As many panels per task as leave the partial sums in L2 and every thread busy; more if many
    // layers share rows, so that each layer is written in longer runs.
    const bool shared = plan_.written() > 4 * plan_.rows();
    task_panels_ = (shared ? 4 : 1) * (by_rows_ ? kTaskRows : kTaskPanels);
    if (parts_ == 1) {
      task_panels_ = std::min(task_panels_, plan_.rows() / (math_.panel * threads_ * 4));
    }
    if (tiles_ > 1) task_panels_ = std::min(task_panels_, kThreadAccumulatorBytes / panel_acc);
    if (!resident) task_panels_ = 1;
    task_panels_ = std::max<int64_t>(1, task_panels_);
    task_rows_ = task_panels_ * math_.panel;
    plan_.cut(task_rows_);
    const int64_t workers = std::min(threads_, plan_.tasks() * parts_);

    // Partial sums belong to the thread if all tiles of a task follow one another, else to the
    // part of the task.
    const int64_t acc_batch = tiles_ > 1 ? batch_ : math_.max_batch;
    constexpr auto kLine = static_cast<int64_t>(kAlignment);  // no line belongs to two parts
    task_acc_ = divide_up(acc_batch * task_rows_ * math_.acc_bytes, kLine) * kLine;
    const bool of_thread = resident && parts_ == 1;
    const int64_t group = of_thread ? plan_.tasks()
                                    : std::clamp<int64_t>(kAccumulatorBytes / (parts_ * task_acc_),
                                                          1, std::max<int64_t>(1, plan_.tasks()));
    const int64_t panel_bytes = tile_depth() * math_.panel * 4;
    from_kept_ = kept_.entries != nullptr && (math_.pairs || slices_ <= kKeptSlices);
    thread_tile_ = fused_ || from_kept_ ? 0 : task_panels_ * panel_bytes;
    tile_buffer_ = allocate(workers * thread_tile_);
    acc_buffer_ = allocate((of_thread ? workers : group * parts_) * task_acc_);
    packed_buffer_ = allocate(window * packed_tile);

    for (int64_t task = 0; task < plan_.tasks(); task += group) {
      const int64_t count = std::min(group, plan_.tasks() - task);
      for (int64_t tile = 0; tile < tiles_; tile += window) {
        const int64_t end = std::min(tile + window, tiles_);
        if (!math_.in_place) pack_tiles(tile, end);
        run_parallel(count * parts_, workers, [&](int64_t i, int64_t worker) {
          run_task(plan_.task(task + i / parts_), i % parts_, tile, end,
                   tile_buffer_.get() + worker * thread_tile_,
                   acc_buffer_.get() + (of_thread ? worker : i) * task_acc_);
        });
      }
      for (int64_t i = 0; parts_ > 1 && i < count; ++i) {
        const RowPlan::Task rows = plan_.task(task + i);
        char* acc = acc_buffer_.get() + i * parts_ * task_acc_;
        math_.acc_bytes == 8 ? add_parts<double>(rows, acc) : add_parts<float>(rows, acc);
        scale_layers(rows, 0, batch_, acc);
      }
    }
  }

  template <class Acc>
  void add_parts(const RowPlan::Task& task, char* acc) const {
    for (int64_t part = 1; part < parts_; ++part) {
      for (int64_t m = 0; m < batch_; ++m) {
        auto* sum = reinterpret_cast<Acc*>(acc) + m * task_rows_;
        const auto* more = reinterpret_cast<const Acc*>(acc + part * task_acc_) + m * task_rows_;
        for (int64_t r = 0; r < task.rows; ++r) sum[r] += more[r];
      }
    }
  }

  // First error row of a slice of the batch. Slices are even, so that none is a single row.
  int64_t slice_begin(int64_t slice) const { return slice * batch_ / slices_; }

  // Of the error, where it is read in place.
  int64_t first_column(int64_t tile) const {
    return tile * tile_units_ * kUnitColumns + depth(tile).begin * math_.columns - head_;
  }

  char* packed(int64_t tile, int64_t window_begin, int64_t slice) const {
    return packed_buffer_.get() + ((tile - window_begin) * tile_depth() * batch_ +
                                   depth(tile).size() * slice_begin(slice)) *
                                      math_.bytes;
  }

  const char* in_place(int64_t tile, int64_t slice) const {
    const int64_t first = (pass_begin_ + slice_begin(slice)) * error_.columns;
    return static_cast<const char*>(error_.data) + (first + first_column(tile)) * math_.bytes;
  }

  void pack_tiles(int64_t begin, int64_t end) {
    const int64_t count = (end - begin) * slices_;
    const int64_t numbers = (end - begin) * tile_depth() * batch_;
    const int64_t pay = std::max<int64_t>(1, numbers / kSerialPacking);
    run_parallel(count, std::min({threads_, divide_up(count, 8), pay}), [&](int64_t i, int64_t) {
      const int64_t tile = begin + i / slices_, slice = i % slices_;
      const Depth d = depth(tile);
      const int64_t first = slice_begin(slice);
      PackSpec spec{};
      spec.error = &error_;
      spec.first = pass_begin_ + first;
      spec.batch = static_cast<int>(slice_begin(slice + 1) - first);
      spec.column = first_column(tile);
      spec.depth = d.size();
      spec.by_rows = by_rows_;
      spec.out = packed(tile, begin, slice);
      math_.pack(spec);
    });
  }

  void make_rows(const RowPlan::Task& task, int64_t tile, char* tile_buffer) const {
    FillSpec spec{};
    spec.seed = stream_.seed;
    spec.distribution = stream_.distribution;
    spec.row = task.row;
    spec.rows = task.rows;
    spec.column = (first_unit_ + tile * tile_units_) * kUnitColumns;
    spec.columns = std::min(tile_units_, units_ - tile * tile_units_) * kUnitColumns;
    spec.out = tile_buffer;
    spec.out_stride = tile_units_ * kUnitColumns;
    spec.lattice = true;
    kernels_.fill[static_cast<int>(math_.pairs ? Type::kBFloat16 : Type::kFloat32)](spec);
  }

  // The first panel of a task.
  TileSpec panel(const RowPlan::Task& task, int64_t tile) const {
    TileSpec spec{};
    spec.seed = stream_.seed;
    spec.distribution = stream_.distribution;
    spec.row = task.row;
    spec.unit = first_unit_ + tile * tile_units_;
    spec.units = std::min(tile_units_, units_ - tile * tile_units_);
    return spec;
  }

  void make_tile(const RowPlan::Task& task, int64_t tile, char* tile_buffer) const {
    if (by_rows_) return make_rows(task, tile, tile_buffer);
    TileSpec spec = panel(task, tile);
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

  // Makes kept panels if they are not, and unpacks them where they are multiplied more than once.
  void use_kept(const RowPlan::Task& task, int64_t tile, char* tile_buffer) const {
    TileSpec spec = panel(task, tile);
    for (int64_t row = 0; row < task.rows; row += kernels_.panel) {
      spec.row = task.row + static_cast<uint64_t>(row);
      auto* pairs = reinterpret_cast<uint32_t*>(kept_panel(spec.row, tile));
      if (!kept_.made) kernels_.tile_bf16(spec, pairs);
      if (from_kept_) continue;
      kernels_.unpack_tile(pairs, spec.units,
                           reinterpret_cast<float*>(tile_buffer + row * tile_depth() * 4));
    }
  }

  // Part p has the tiles p, p + parts_, ..
  void run_task(const RowPlan::Task& task, int64_t part, int64_t tile_begin, int64_t tile_end,
                char* tile_buffer, char* acc_buffer) const {
    const int64_t earlier = divide_up(std::max<int64_t>(0, tile_begin - part), parts_);
    for (int64_t tile = part + earlier * parts_; tile < tile_end; tile += parts_) {
      TileSpec entries = panel(task, tile);
      if (kept_.entries != nullptr) {
        use_kept(task, tile, tile_buffer);
      } else if (!fused_) {
        make_tile(task, tile, tile_buffer);
      }
      const Depth d = depth(tile);
      MultiplySpec spec{};
      spec.depth = d.size();
      spec.begin = d.begin;
      spec.acc_stride = task_rows_;
      spec.accumulate = tile > part;
      spec.error_stride = math_.in_place ? error_.columns : d.size();
      const bool last = parts_ == 1 && tile + 1 == tiles_;
      const Layer* const alone = last ? direct_layer(task) : nullptr;
      if (alone != nullptr) {
        spec.out_stride = alone->size;
        spec.scale = alone->scale;
      }
      for (int64_t slice = 0; slice < slices_; ++slice) {
        const int64_t first = slice_begin(slice);
        char* acc = acc_buffer + (tiles_ > 1 ? first : 0) * task_rows_ * math_.acc_bytes;
        spec.error = math_.in_place ? in_place(tile, slice) : packed(tile, tile_begin, slice);
        spec.batch = static_cast<int>(slice_begin(slice + 1) - first);
        int64_t written = 0;
        for (int64_t r = 0; r < task.rows; r += math_.panel) {
          spec.acc = acc + r * math_.acc_bytes;
          if (alone != nullptr && r + math_.panel <= task.rows) {
            spec.out = output(*alone, first, task.row + static_cast<uint64_t>(r));
            written = r + math_.panel;
          } else {
            spec.out = nullptr;
          }
          entries.row = task.row + static_cast<uint64_t>(r);
          if (from_kept_) {
            const int64_t skipped = math_.pairs ? d.begin : 0;  // else the kernel skips them
            spec.tile = kept_panel(entries.row, tile) + skipped * math_.panel * 4;
            math_.multiply_kept(spec);
          } else if (fused_) {
            math_.fused(entries, spec);
          } else {
            spec.tile = tile_buffer + (r * tile_depth() + d.begin * math_.panel) * 4;
            math_.multiply(spec);
          }
        }
        if (last && written < task.rows) {
          const RowPlan::Task rest{task.row + static_cast<uint64_t>(written), task.rows - written};
          scale_layers(rest, first, spec.batch, acc + written * math_.acc_bytes);
        }
      }
    }
  }

  // The layer to which products write the signals themselves: it alone reads the task's rows.
  const Layer* direct_layer(const RowPlan::Task& task) const {
    if (!math_.direct || past_caches_) return nullptr;
    const Layer* found = nullptr;
    int64_t rows = 0;
    plan_.for_each_layer(task, [&](const Layer& layer, uint64_t begin, uint64_t end) {
      found = &layer;
      rows += static_cast<int64_t>(end - begin);
    });
    const bool whole = found->row_offset <= task.row &&
                       task.row + static_cast<uint64_t>(task.rows) <= found->end();
    return whole && rows == task.rows ? found : nullptr;
  }

  // Of a layer, where the signals of this row of U begin for the error rows from `first` on.
  char* output(const Layer& layer, int64_t first, uint64_t row) const {
    const auto skipped = static_cast<int64_t>(row - layer.row_offset);
    return static_cast<char*>(layer.out) +
           ((pass_begin_ + first) * layer.size + skipped) * out_bytes_;
  }

  void scale_layers(const RowPlan::Task& task, int64_t first, int64_t batch,
                    const char* acc) const {
    plan_.for_each_layer(task, [&](const Layer& layer, uint64_t begin, uint64_t end) {
      ScaleSpec spec{};
      spec.acc = acc + static_cast<int64_t>(begin - task.row) * math_.acc_bytes;
      spec.acc_stride = task_rows_;
      spec.out = output(layer, first, begin);
      spec.out_stride = layer.size;
      spec.batch = batch;
      spec.rows = static_cast<int64_t>(end - begin);
      spec.scale = layer.scale;
      spec.past_caches =
          past_caches_ && (used_again_ || layer.size * error_.batch * out_bytes_ < kMappedBytes);
      math_.scale(spec);
    });
  }

  const Stream stream_;
  const ErrorMatrix error_;
  const int64_t out_bytes_;
  const Kernels& kernels_;
  RowPlan plan_;
  bool by_rows_;
  Arithmetic math_;
  int64_t head_, first_unit_, units_, tiles_, tile_units_;
  int64_t parts_ = 1;
  int64_t pass_begin_ = 0, batch_ = 0, slices_ = 0, threads_ = 1;
  bool past_caches_ = false, used_again_ = false, fused_ = false;
  bool from_kept_ = false;  // the product reads kept entries where they are
  int64_t task_panels_ = 1, task_rows_ = 1, task_acc_ = 0, thread_tile_ = 0;
  KeptKey key_;
  Kept kept_;
  Buffer tile_buffer_, acc_buffer_, packed_buffer_;
};

}  // namespace

void project_cpu(const Stream& stream, const ErrorMatrix& error, std::vector<Layer> layers,
                 Type out_type) {
  if (stream.distribution == Distribution::kHadamard) {
    return project_structured_cpu(stream, error, layers, out_type);
  }
  Projection(stream, error, std::move(layers), out_type).run();
}

}  // namespace dfa
