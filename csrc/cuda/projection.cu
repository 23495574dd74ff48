// The host's side of the fused projection: which kernel, with which table, on what error.
#include <limits>

#include "kernels.h"
#include "prepare.h"

namespace dfa {

FusedKernel fused_kernel(Distribution distribution, Operand operand, int shape) {
  return for_distribution(distribution,
                          [&](auto kind) { return fused_kernel<kind>(operand, shape); });
}

namespace {

Operand operand_of(Type error_type, int terms) {
  if (error_type == Type::kFloat16) return Operand::kHalf;
  return terms == 3 ? Operand::kExact : Operand::kBFloat16;
}

struct Candidate {
  int shape;
  FusedKernel kernel;
  int resident;
};

// The kernels that fit the current device's shared memory.
std::vector<Candidate> candidates(Distribution distribution, Operand operand, int terms,
                                  const DeviceLimits& limits) {
  std::vector<Candidate> found;
  for (int shape = 0; shape < kShapes; ++shape) {
    const FusedKernel kernel = fused_kernel(distribution, operand, shape);
    const int bytes = kernel.shared_bytes(terms);
    if (kernel.kernel == nullptr || bytes > limits.shared_bytes) continue;
    if (kernel.groups && !limits.warpgroups) continue;
    const int resident = resident_blocks(kernel.kernel, kernel.threads(), bytes);
    if (resident > 0) found.push_back({shape, kernel, resident});
  }
  return found;
}

// The tile asked for, or the one that the estimate says is fastest.
Candidate choose(const Work& work, Operand operand, int64_t tile, const DeviceLimits& limits) {
  const auto found = candidates(work.distribution, operand, work.terms, limits);
  const Candidate* best = nullptr;
  double least = std::numeric_limits<double>::infinity();
  std::string indices;
  for (const Candidate& candidate : found) {
    indices += (indices.empty() ? "" : ", ") + std::to_string(candidate.shape);
    if (tile >= 0 && candidate.shape != tile) continue;
    const double cycles =
        estimated_cycles(work, candidate.kernel, candidate.resident, limits.processors);
    if (cycles < least) {
      least = cycles;
      best = &candidate;
    }
  }
  if (found.empty()) {
    throw std::runtime_error("dfa_kernels: no tile fits this GPU's shared memory");
  }
  if (best == nullptr) {
    throw std::runtime_error("project: tile must be one of [" + indices + "], got " +
                             std::to_string(tile));
  }
  return *best;
}

// The kernel also forms addresses of error rows after the last, though it reads nothing there.
// Those after a single row are the row's own, because its stride may be anything.
int64_t batch_stride(const StridedMatrix& error) {
  return error.batch == 1 ? 0 : error.batch_stride;
}

bool usable_as_it_is(const StridedMatrix& error, int64_t head, const FusedKernel& kernel) {
  return !kernel.groups && error.type != Type::kFloat32 && head == 0 && error.columns > 0 &&
         error.columns % 8 == 0 && error.column_stride == 1 &&
         reinterpret_cast<uintptr_t>(error.data) % 16 == 0 && batch_stride(error) % 8 == 0;
}

void set_error(const StridedMatrix& error, int64_t head, const FusedKernel& kernel, int terms,
               const Allocate& allocate, const DeviceLimits& limits, void* stream,
               FusedParameters& p) {
  p.batch = error.batch;
  p.terms = terms;
  const int64_t step = kernel.groups ? kStripColumns : 8;
  p.columns = std::max<int64_t>(1, divide_up(head + error.columns, step)) * step;
  if (usable_as_it_is(error, head, kernel)) {
    p.error = static_cast<const uint16_t*>(error.data);
    p.batch_stride = batch_stride(error);
    p.term_stride = 0;
    return;
  }
  auto* out = static_cast<uint16_t*>(allocate(2 * terms * error.batch * p.columns));
  const PrepareParameters prepared{
      error.data, error.batch, error.columns, error.batch_stride, error.column_stride,
      error.type, terms,       head,          p.columns,          kernel.groups,
      out};
  const int64_t blocks = divide_up(error.batch * (p.columns / 8), 256);
  launch(prepare, prepared, std::min<int64_t>(blocks, 8 * limits.processors), 256, 0, stream);
  p.error = out;
  p.batch_stride = p.columns;
  p.term_stride = error.batch * p.columns;
}

}  // namespace

void project_cuda(const Stream& stream, const StridedMatrix& error, std::vector<Layer> layers,
                  Type out_type, int terms, const Forced& forced, const Allocate& allocate,
                  void* cuda_stream) {
  if (layers.empty() || error.batch == 0) return;
  DeviceLimits limits = device_limits();
  if (forced.processors > 0) limits.processors = static_cast<int>(forced.processors);
  const int64_t block_columns = facts(stream.distribution).block;
  RowPlan plan(std::move(layers));

  FusedParameters p{};
  p.keys = RoundKeys(stream.seed);
  p.out_type = out_type;
  p.first_block = static_cast<uint32_t>(stream.column_offset / block_columns);
  const int64_t head = stream.column_offset % block_columns;
  const Work work{stream.distribution, plan.rows(),          plan.written(),
                  error.batch,         head + error.columns, terms};
  const Candidate choice = choose(work, operand_of(error.type, terms), forced.tile, limits);
  set_error(error, head, choice.kernel, terms, allocate, limits, cuda_stream, p);
  p.steps = static_cast<int32_t>(divide_up(p.columns, choice.kernel.stage_columns));
  plan.cut(choice.kernel.rows);
  p.row_tiles = plan.tasks();
  p.items = p.row_tiles * divide_up(p.batch, choice.kernel.batch);
  set_table(plan, plan, allocate, cuda_stream, p.table);
  const int64_t blocks = int64_t{limits.processors} * choice.resident;
  launch(choice.kernel.kernel, p, std::min(p.items, blocks), choice.kernel.threads(),
         choice.kernel.shared_bytes(terms), cuda_stream);
}

std::vector<Tile> cuda_tiles(Distribution distribution, Type error_type, int terms) {
  std::vector<Tile> tiles;
  const Operand operand = operand_of(error_type, terms);
  for (const Candidate& each : candidates(distribution, operand, terms, device_limits())) {
    tiles.push_back({each.shape, each.kernel.name()});
  }
  return tiles;
}

}  // namespace dfa
