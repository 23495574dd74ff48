// Uploads a layer table that is too long for kernel arguments.
#include "device.h"
#include "schedule.h"

namespace dfa {
namespace {

constexpr int kUploadWords = 500;

struct UploadParameters {
  uint64_t* to;
  int32_t count;
  uint64_t words[kUploadWords];
};
static_assert(sizeof(UploadParameters) <= 4096, "the limit of kernel arguments on every GPU");

DFA_KERNEL(256, 1) upload(DFA_ARGUMENT UploadParameters p) {
  for (int i = device::thread(); i < p.count; i += 256) p.to[i] = p.words[i];
}

}  // namespace

void set_table(const RowPlan& plan, const RowPlan& tiles, const Allocate& allocate,
               void* cuda_stream, LayerTable& table) {
  const std::vector<uint64_t> words = table_words(plan, tiles);
  table.layers = static_cast<int32_t>(plan.layers().size());
  table.intervals = static_cast<int32_t>(tiles.intervals().size());
  table.far = nullptr;
  if (words.size() <= kNearWords) {
    std::copy(words.begin(), words.end(), table.near);
    return;
  }
  auto* far = static_cast<uint64_t*>(allocate(static_cast<int64_t>(8 * words.size())));
  for (size_t done = 0; done < words.size(); done += kUploadWords) {
    UploadParameters part{};
    part.to = far + done;
    part.count = static_cast<int32_t>(std::min<size_t>(kUploadWords, words.size() - done));
    std::copy_n(words.begin() + static_cast<std::ptrdiff_t>(done), part.count, part.words);
    launch(upload, part, 1, 256, 0, cuda_stream);
  }
  table.far = far;
}

}  // namespace dfa
