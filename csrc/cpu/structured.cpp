// Structured feedback: the projection, its transpose and the matrix, by Walsh-Hadamard transforms.
//
// Each row of the error is transformed once, into turned squares; see hadamard.h. From these each
// output block takes one more transform. The workspace is bounded: kTransformedBytes (of the
// transpose kAdjointBytes) or one row of the error, and for each thread the diagonals of the output
// blocks of a task.
#include <algorithm>

#include "../output_blocks.h"
#include "convert.h"
#include "kernels.h"
#include "parallel.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

// A product is rounded before it is added.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace dfa {
namespace {

constexpr int64_t kBlock = kHadamardBlock;
constexpr int64_t kWords = kBlock / 32;  // of a diagonal
constexpr int64_t kTransformedBytes = 4 << 20;
constexpr int64_t kAdjointBytes = 32 << 20;  // of sums, unless one row of the error is longer
constexpr int64_t kTaskDiagonals = 512;      // 64 KiB
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kSerialTransforms = 24;  // below which a second thread does not pay
// Signals are written past the caches if together they exceed this.
constexpr int64_t kCachedBytes = 8 << 20;

alignas(64) constexpr uint32_t kPositive[kWords] = {};  // a diagonal of ones

// Additions round to nearest and subnormal numbers count, whatever the thread's mode: it is part of
// the definition, and threads may differ.
class DefinedRounding {
 public:
  DefinedRounding() : before_(mode()) { set_mode(kDefault); }
  ~DefinedRounding() { set_mode(before_); }
  DefinedRounding(const DefinedRounding&) = delete;
  DefinedRounding& operator=(const DefinedRounding&) = delete;

 private:
#if defined(__SSE2__)
  using Mode = unsigned;
  static constexpr Mode kDefault = 0x1f80;  // no exception is raised
  static Mode mode() { return _mm_getcsr(); }
  static void set_mode(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = uint64_t;
  static constexpr Mode kDefault = 0;
  static Mode mode() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  using Mode = int;
  static constexpr Mode kDefault = 0;
  static Mode mode() { return kDefault; }
  static void set_mode(Mode) {}
#endif
  Mode before_;
};

// The blocks of columns in which an error lies, and their inner diagonals.
class Inputs {
 public:
  Inputs(const Stream& stream, int64_t columns)
      : columns_(columns),
        head_(stream.column_offset % kBlock),
        first_(stream.column_offset / kBlock),
        count_(columns == 0 ? 0 : divide_up(head_ + columns, kBlock)),
        diagonals_(allocate(std::max<int64_t>(1, 2 * count_ * kWords * 4))) {
    for (uint32_t domain = 1; count_ > 0 && domain <= 2; ++domain) {
      kernels().make_signs({stream.seed, domain, 0, first_, count_}, diagonal(domain, 0));
    }
  }

  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  uint32_t* diagonal(uint32_t domain, int64_t block) const {
    return reinterpret_cast<uint32_t*>(diagonals_.get()) + ((domain - 1) * count_ + block) * kWords;
  }

  // Calls use(column of the error, place in the block, how many) for the columns of a block.
  template <class Use>
  void columns_of(int64_t block, const Use& use) const {
    const int64_t first = block * kBlock - head_;
    const int64_t begin = std::max<int64_t>(first, 0), end = std::min(first + kBlock, columns_);
    use(begin, begin - first, end - begin);
  }

 private:
  int64_t columns_, head_, first_, count_;
  Buffer diagonals_;
};

template <class Real>
const TransformKernels& transforms() {
  return sizeof(Real) == 8 ? kernels().transform_f64 : kernels().transform_f32;
}

// Calls use() with a null pointer to the numbers' C++ type.
template <class Use>
void for_type(Type type, const Use& use) {
  switch (type) {
    case Type::kFloat32:
      return use(static_cast<float*>(nullptr));
    case Type::kBFloat16:
      return use(static_cast<BFloat16*>(nullptr));
    case Type::kFloat16:
      return use(static_cast<Half*>(nullptr));
    case Type::kFloat64:
      return use(static_cast<double*>(nullptr));
  }
}

int64_t threads_for(int64_t transforms) {
  return transforms < kSerialTransforms ? 1
                                        : static_cast<int64_t>(torch::stable::get_num_threads());
}

template <class Real>
void project(const Stream& stream, const ErrorMatrix& error, const std::vector<Layer>& layers,
             Type out_type) {
  const Kernels& k = kernels();
  const TransformKernels& t = transforms<Real>();
  const ScaleKernel scale = (sizeof(Real) == 8 ? k.scale_f64 : k.scale_f32)[int(out_type)];
  const int64_t out_bytes = type_bytes(out_type);
  const Inputs inputs(stream, error.columns);
  const OutputBlocks outputs(layers);
  if (outputs.count() == 0) return;
  const bool same_type = out_type == (sizeof(Real) == 8 ? Type::kFloat64 : Type::kFloat32);
  const bool past_caches = outputs.written() * error.batch * out_bytes > kCachedBytes;

  const int64_t row_bytes = std::max<int64_t>(1, inputs.count()) * kBlock * int64_t{sizeof(Real)};
  const int64_t pass = std::min(error.batch, std::max<int64_t>(1, kTransformedBytes / row_bytes));
  const int64_t threads = threads_for(pass * (2 * inputs.count() + outputs.count()));
  const Buffer transformed = allocate(pass * row_bytes);
  const auto square = [&](int64_t m, int64_t block) {
    return reinterpret_cast<Real*>(transformed.get() + m * row_bytes) + block * kBlock;
  };

  // A task makes some output blocks for some rows of the batch.
  const int64_t wanted = threads == 1 ? 1 : threads * kTasksPerThread;
  const int64_t task_blocks = std::clamp<int64_t>(
      outputs.count() / wanted, 1,
      std::max<int64_t>(1, kTaskDiagonals / std::max<int64_t>(1, inputs.count())));
  const int64_t across = divide_up(outputs.count(), task_blocks);
  const int64_t task_batch = std::max<int64_t>(1, pass / divide_up(wanted, across));
  const int64_t diagonal_bytes = std::max<int64_t>(1, task_blocks * inputs.count() * kWords * 4);
  const Buffer diagonals = allocate(threads * diagonal_bytes);

  for (int64_t first = 0; first < error.batch; first += pass) {
    const int64_t batch = std::min(pass, error.batch - first);

    const int64_t squares = batch * inputs.count();
    run_parallel(squares, std::min(threads, divide_up(squares, 8)), [&](int64_t i, int64_t) {
      const DefinedRounding rounding;
      const int64_t m = i / inputs.count(), block = i % inputs.count();
      alignas(64) Real natural[kBlock] = {}, transformed_once[kBlock];
      inputs.columns_of(block, [&](int64_t column, int64_t place, int64_t size) {
        for_type(error.type, [&](auto* type) {
          const auto* from = static_cast<decltype(type)>(const_cast<void*>(error.data)) +
                             (first + m) * error.columns + column;
          for (int64_t c = 0; c < size; ++c) natural[place + c] = Real(widen(from[c]));
        });
      });
      t.transform_natural(natural, inputs.diagonal(1, block), 1, transformed_once);
      t.transform_natural(transformed_once, inputs.diagonal(2, block), 1, natural);
      t.turn(natural, square(m, block));
    });

    const int64_t tasks = across * divide_up(batch, task_batch);
    run_parallel(tasks, std::min(threads, tasks), [&](int64_t task, int64_t worker) {
      const DefinedRounding rounding;
      const int64_t begin = task % across * task_blocks;
      const int64_t end = std::min(begin + task_blocks, outputs.count());
      const int64_t row = task / across * task_batch, last = std::min(row + task_batch, batch);
      auto* const signs = reinterpret_cast<uint32_t*>(diagonals.get() + worker * diagonal_bytes);
      std::vector<std::vector<OutputBlocks::Part>> parts(static_cast<size_t>(end - begin));
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t block = outputs.block(i);
        outputs.parts(block, parts[static_cast<size_t>(i - begin)]);
        if (inputs.count() == 0) continue;
        k.make_signs({stream.seed, 3, block, inputs.first(), inputs.count()},
                     signs + (i - begin) * inputs.count() * kWords);
      }
      alignas(64) Real natural[kBlock] = {};
      for (int64_t m = row; m < last; ++m) {
        for (int64_t i = 0; i < end - begin; ++i) {
          const uint32_t* const of_block = signs + i * inputs.count() * kWords;
          const std::vector<OutputBlocks::Part>& readers = parts[static_cast<size_t>(i)];
          if (same_type && inputs.count() > 0 && readers.size() == 1 && readers[0].size == kBlock) {
            const auto& [layer, place, skipped, size] = readers[0];
            Real* signal = static_cast<Real*>(layer->out) + (first + m) * layer->size + skipped;
            t.transform_signal(square(m, 0), of_block, inputs.count(), layer->scale, past_caches,
                               signal);
            continue;
          }
          if (inputs.count() > 0) {
            t.transform(square(m, 0), of_block, inputs.count(), natural);
          }
          for (const auto& [layer, place, skipped, size] : readers) {
            ScaleSpec spec{};
            spec.acc = natural + place;
            spec.out =
                static_cast<char*>(layer->out) + ((first + m) * layer->size + skipped) * out_bytes;
            spec.batch = 1;
            spec.rows = size;
            spec.scale = layer->scale;
            spec.past_caches = past_caches;
            scale(spec);
          }
        }
      }
    });
  }
}

template <class Real>
void adjoint(const Stream& stream, const std::vector<Layer>& layers, Type in_type, int64_t batch,
             int64_t columns, Type out_type, void* out) {
  const Kernels& k = kernels();
  const TransformKernels& t = transforms<Real>();
  const Inputs inputs(stream, columns);
  const OutputBlocks outputs(layers);

  const int64_t row_bytes = inputs.count() * kBlock * int64_t{sizeof(Real)};
  const int64_t threads = std::clamp<int64_t>(
      kAdjointBytes / row_bytes, 1, threads_for(batch * (2 * inputs.count() + outputs.count())));
  // A task makes some rows of the error.
  const int64_t task_batch =
      std::clamp<int64_t>(batch / (threads * kTasksPerThread), 1,
                          std::max<int64_t>(1, kTransformedBytes / (threads * row_bytes)));
  const int64_t tasks = divide_up(batch, task_batch);
  const int64_t workers = std::min(threads, tasks);
  const int64_t sum_bytes = task_batch * row_bytes;
  const int64_t diagonal_bytes = inputs.count() * kWords * 4;
  const Buffer sums_of = allocate(workers * sum_bytes);
  const Buffer diagonals_of = allocate(workers * diagonal_bytes);

  run_parallel(tasks, workers, [&](int64_t task, int64_t worker) {
    const DefinedRounding rounding;
    const int64_t first = task * task_batch, last = std::min(first + task_batch, batch);
    auto* const sums = reinterpret_cast<Real*>(sums_of.get() + worker * sum_bytes);
    auto* const signs = reinterpret_cast<uint32_t*>(diagonals_of.get() + worker * diagonal_bytes);
    std::fill_n(sums, task_batch * inputs.count() * kBlock, Real{0});
    alignas(64) Real natural[kBlock], summed[kBlock], turned[kBlock];
    std::vector<OutputBlocks::Part> parts;
    for (int64_t i = 0; i < outputs.count(); ++i) {
      const uint64_t block = outputs.block(i);
      outputs.parts(block, parts);
      k.make_signs({stream.seed, 3, block, inputs.first(), inputs.count()}, signs);
      for (int64_t m = first; m < last; ++m) {
        std::fill_n(natural, kBlock, Real{0});
        for (const auto& [layer, place, skipped, size] : parts) {
          const Real factor = static_cast<Real>(layer->scale);
          for_type(in_type, [&](auto* type) {
            const auto* from = static_cast<decltype(type)>(layer->out) + m * layer->size + skipped;
            for (int64_t r = 0; r < size; ++r) {
              natural[place + r] += factor * static_cast<Real>(widen(from[r]));
            }
          });
        }
        t.transform_natural(natural, kPositive, 1, summed);
        t.turn(summed, turned);
        t.accumulate(turned, signs, inputs.count(), sums + (m - first) * inputs.count() * kBlock);
      }
    }
    for (int64_t m = first; m < last; ++m) {
      for (int64_t block = 0; block < inputs.count(); ++block) {
        Real* const sum = sums + ((m - first) * inputs.count() + block) * kBlock;
        t.transform(sum, kPositive, 1, summed);
        t.transform_natural(summed, inputs.diagonal(2, block), 1, natural);
        const uint32_t* words = inputs.diagonal(1, block);
        inputs.columns_of(block, [&](int64_t column, int64_t place, int64_t size) {
          for_type(out_type, [&](auto* type) {
            using Out = std::remove_pointer_t<decltype(type)>;
            Out* to = static_cast<Out*>(out) + m * columns + column;
            for (int64_t c = 0; c < size; ++c) {
              const Real value = natural[place + c];
              to[c] = round_to<Out>(is_negative(words, place + c) ? -value : value);
            }
          });
        });
      }
    }
  });
}

}  // namespace

void project_structured_cpu(const Stream& stream, const ErrorMatrix& error,
                            const std::vector<Layer>& layers, Type out_type) {
  const bool wide = error.type == Type::kFloat64;
  (wide ? project<double> : project<float>)(stream, error, layers, out_type);
}

void adjoint_structured_cpu(const Stream& stream, const std::vector<Layer>& layers, Type in_type,
                            int64_t batch, int64_t columns, Type out_type, void* out) {
  if (batch == 0 || columns == 0) return;
  const bool wide = out_type == Type::kFloat64;
  (wide ? adjoint<double> : adjoint<float>)(stream, layers, in_type, batch, columns, out_type, out);
}

// Row r of a block is that of H with the signs of D3, transformed, signed by D2, transformed, and
// signed by D1. All is exact in fp32.
void feedback_matrix_structured_cpu(const Stream& stream, uint64_t row_offset, int64_t rows,
                                    int64_t columns, Type type, void* out) {
  const Kernels& k = kernels();
  const TransformKernels& t = k.transform_f32;
  const Inputs inputs(stream, columns);
  const uint64_t first = row_offset / kBlock;
  const int64_t outputs = int64_t((row_offset + uint64_t(rows) - 1) / kBlock - first) + 1;
  constexpr int64_t kTaskRows = 64;
  const int64_t strips = kBlock / kTaskRows;
  const int64_t tasks = outputs * strips * inputs.count();
  uint32_t parities[32];  // bit by bit: the signs of row r of H, for r < 32
  for (uint32_t r = 0; r < 32; ++r) {
    parities[r] = 0;
    for (uint32_t c = 0; c < 32; ++c) {
      parities[r] |= uint32_t(__builtin_parity(r & c)) << sign_bit(int(c));
    }
  }
  run_parallel(tasks, threads_for(rows * inputs.count()), [&](int64_t task, int64_t) {
    const DefinedRounding rounding;
    const int64_t input = task % inputs.count();
    const uint64_t output = first + uint64_t(task / inputs.count() / strips);
    const uint64_t strip = output * kBlock + uint64_t(task / inputs.count() % strips * kTaskRows);
    const uint64_t begin = std::max(strip, row_offset);
    const uint64_t end = std::min(strip + kTaskRows, row_offset + uint64_t(rows));
    if (begin >= end) return;
    uint32_t outer[kWords], signs[kWords];
    k.make_signs({stream.seed, 3, output, inputs.first() + input, 1}, outer);
    alignas(64) float ones[kBlock], natural[kBlock], summed[kBlock], last[kBlock];
    std::fill_n(ones, kBlock, 1.0f);
    const uint32_t* words = inputs.diagonal(1, input);
    for (int64_t c = 0; c < kBlock; ++c) {
      last[c] = is_negative(words, c) ? -0x1p-10f : 0x1p-10f;
    }
    for (uint64_t row = begin; row < end; ++row) {
      const auto high = uint32_t(row % kBlock / 32), low = uint32_t(row % 32);
      for (uint32_t w = 0; w < kWords; ++w) {
        signs[w] = outer[w] ^ parities[low] ^ (0u - uint32_t(__builtin_parity(high & w)));
      }
      t.transform(ones, signs, 1, summed);
      t.transform_natural(summed, inputs.diagonal(2, input), 1, natural);
      inputs.columns_of(input, [&](int64_t column, int64_t place, int64_t size) {
        for_type(type, [&](auto* kind) {
          using Out = std::remove_pointer_t<decltype(kind)>;
          Out* to = static_cast<Out*>(out) + int64_t(row - row_offset) * columns + column;
          for (int64_t c = 0; c < size; ++c) {
            to[c] = round_to<Out>(natural[place + c] * last[place + c]);
          }
        });
      });
    }
  });
}

}  // namespace dfa
