#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace dfa {

#if defined(__linux__)

struct Block {
  void* data;
  uintptr_t bytes;
  uint64_t since;   // the call since which it is idle
  bool again;       // an earlier tensor has had it
  int64_t tensors;  // that have it now
  std::list<Block>::iterator self;
};

namespace {

using Blocks = std::list<Block>;

constexpr uintptr_t kHugePage = 2 << 20;
constexpr uintptr_t kStep = 64 << 10;  // sizes of blocks are multiples of it
constexpr uint64_t kKeptCalls = 64;    // a block that so many calls did not take is unmapped
// A process has some 65,000 mappings, and each block is one: with so many no small one is mapped.
constexpr size_t kManyBlocks = 64;

uintptr_t round_up(uintptr_t value, uintptr_t to) { return (value + to - 1) / to * to; }

// Begins at a huge page, so that it can be made of them.
void* map(uintptr_t bytes) {
  void* const mapped =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t data = round_up(begin, kHugePage), end = begin + bytes + kHugePage;
  if (data > begin) munmap(mapped, data - begin);
  if (end > data + bytes) munmap(reinterpret_cast<void*>(data + bytes), end - data - bytes);
  madvise(reinterpret_cast<void*>(data), bytes, MADV_HUGEPAGE);  // if not, its pages are small
  return reinterpret_cast<void*>(data);
}

// Blocks move between two lists, which takes no memory: a deleter must not throw.
class Pool {
 public:
  // Never destroyed: tensors may outlive everything.
  static Pool& the() {
    static Pool* const pool = [] {
      auto* made = new Pool;
      // A child must not find the lock held by a thread that it does not have.
      pthread_atfork([] { the().lock_.lock(); }, [] { the().lock_.unlock(); },
                     [] { the().lock_.unlock(); });
      return made;
    }();
    return *pool;
  }

  Block* take(int64_t bytes, int64_t tensors) {
    if (!on_) return nullptr;
    const auto wanted = round_up(static_cast<uintptr_t>(bytes), kStep);
    const std::lock_guard<std::mutex> guard(lock_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it) {
      const bool fits = wanted <= it->bytes && it->bytes <= wanted + wanted / 8;
      if (fits && (best == idle_.end() || it->bytes < best->bytes)) best = it;
    }
    if (best != idle_.end()) {
      best->again = true;
      idle_bytes_ -= best->bytes;
      held_.splice(held_.begin(), idle_, best);
    } else if (wanted <= static_cast<uintptr_t>(kSharedBytes) && held_.size() >= kManyBlocks) {
      return nullptr;
    } else {
      Blocks made(1);
      // All blocks together are at most what tensors held at once, and hold now.
      const uintptr_t most = std::max({peak_, last_peak_, held_bytes_ + wanted});
      unmap_down_to(most - held_bytes_ - wanted);
      void* data = map(wanted);
      if (data == nullptr) {
        unmap_down_to(0);
        data = map(wanted);
      }
      if (data == nullptr) return nullptr;
      made.front() = {data, wanted, 0, false, 0, made.begin()};
      held_.splice(held_.begin(), made);
    }
    held_.front().tensors = tensors;
    held_bytes_ += held_.front().bytes;
    peak_ = std::max(peak_, held_bytes_);
    return &held_.front();
  }

  void give(Block* block) {
    const std::lock_guard<std::mutex> guard(lock_);
    if (--block->tensors > 0) return;
    block->since = calls_;
    held_bytes_ -= block->bytes;
    idle_bytes_ += block->bytes;
    idle_.splice(idle_.end(), held_, block->self);  // the one idle longest is first
  }

  bool is_used_again(const void* data) {
    const std::lock_guard<std::mutex> guard(lock_);
    return std::any_of(held_.begin(), held_.end(),
                       [data](const Block& block) { return block.data == data && block.again; });
  }

  void begin_call() {
    const std::lock_guard<std::mutex> guard(lock_);
    if (++calls_ % kKeptCalls == 0) {
      last_peak_ = peak_;
      peak_ = held_bytes_;
    }
    while (!idle_.empty() && calls_ - idle_.front().since >= kKeptCalls) unmap_oldest();
  }

  void bytes(int64_t& held, int64_t& idle) {
    const std::lock_guard<std::mutex> guard(lock_);
    held = static_cast<int64_t>(held_bytes_);
    idle = static_cast<int64_t>(idle_bytes_);
  }

  int64_t empty() {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto before = static_cast<int64_t>(idle_bytes_);
    unmap_down_to(0);
    return before;
  }

 private:
  Pool() {
    const char* const asked = std::getenv("DFA_KERNELS_POOL");
    on_ = asked == nullptr || std::strcmp(asked, "0") != 0;
  }

  void unmap_oldest() {
    munmap(idle_.front().data, idle_.front().bytes);
    idle_bytes_ -= idle_.front().bytes;
    idle_.pop_front();
  }

  void unmap_down_to(uintptr_t bytes) {
    while (idle_bytes_ > bytes) unmap_oldest();
  }

  bool on_;
  std::mutex lock_;
  Blocks held_, idle_;
  uintptr_t held_bytes_ = 0, idle_bytes_ = 0;
  uint64_t calls_ = 0;
  uintptr_t peak_ = 0, last_peak_ = 0;  // of held_bytes_, in these kKeptCalls and those before
};

}  // namespace

void advise_huge_pages(void* data, int64_t bytes) {
  constexpr int64_t kLarge = 8 << 20;
  if (bytes < kLarge) return;
  const auto first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = round_up(first, kHugePage);
  const uintptr_t end = (first + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  // If it is refused, the output has small pages.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

Block* take_block(int64_t bytes, int64_t tensors) { return Pool::the().take(bytes, tensors); }
void* data_of(const Block* block) { return block->data; }
void give_block(void*, void* block) { Pool::the().give(static_cast<Block*>(block)); }
bool is_used_again(const void* data) { return Pool::the().is_used_again(data); }
void begin_call() { Pool::the().begin_call(); }
void pool_bytes(int64_t& held, int64_t& idle) { Pool::the().bytes(held, idle); }
int64_t empty_pool() { return Pool::the().empty(); }

#else

void advise_huge_pages(void*, int64_t) {}
Block* take_block(int64_t, int64_t) { return nullptr; }
void* data_of(const Block*) { return nullptr; }
void give_block(void*, void*) {}
bool is_used_again(const void*) { return false; }
void begin_call() {}
void pool_bytes(int64_t& held, int64_t& idle) { held = idle = 0; }
int64_t empty_pool() { return 0; }

#endif

}  // namespace dfa
