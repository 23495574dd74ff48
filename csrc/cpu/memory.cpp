#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace dfa {

#if defined(__linux__)

namespace {

constexpr uintptr_t kHugePage = 2 << 20;

uintptr_t round_up(uintptr_t value, uintptr_t to) { return (value + to - 1) / to * to; }

constexpr int64_t kSmallest = 1 << 20;  // smaller outputs are left to the allocator
constexpr uint64_t kKeptCalls = 8;      // a block that so many calls did not take is unmapped

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

  void* take(int64_t bytes) {
    if (!on_ || bytes < kSmallest) return nullptr;
    const std::lock_guard<std::mutex> guard(lock_);
    const auto wanted = round_up(static_cast<uintptr_t>(bytes), kStep);
    const auto found = idle_.lower_bound(wanted);
    if (found != idle_.end() && found->first <= wanted + wanted / 8) {
      void* const block = found->second.block;
      idle_bytes_ -= found->first;
      hold(block, {found->first, true});
      idle_.erase(found);
      return block;
    }
    void* block = map(wanted);
    if (block == nullptr) {
      unmap_idle(0);
      block = map(wanted);
    }
    if (block != nullptr) hold(block, {wanted, false});
    return block;
  }

  void give(void* block) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = held_.find(block);
    if (found == held_.end()) return;
    const uintptr_t bytes = found->second.bytes;
    idle_.insert({bytes, {block, calls_}});
    idle_bytes_ += bytes;
    held_bytes_ -= bytes;
    held_.erase(found);
  }

  bool is_used_again(const void* block) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = held_.find(block);
    return found != held_.end() && found->second.again;
  }

  void begin_call() {
    const std::lock_guard<std::mutex> guard(lock_);
    ++calls_;
    unmap_idle(kKeptCalls);
  }

  void bytes(int64_t& held, int64_t& idle) {
    const std::lock_guard<std::mutex> guard(lock_);
    held = static_cast<int64_t>(held_bytes_);
    idle = static_cast<int64_t>(idle_bytes_);
  }

 private:
  static constexpr uintptr_t kStep = 64 << 10;

  struct Idle {
    void* block;
    uint64_t since;  // call
  };

  struct Held {
    uintptr_t bytes;
    bool again;  // an earlier tensor had it
  };

  Pool() {
    const char* const asked = std::getenv("DFA_KERNELS_POOL");
    on_ = asked == nullptr || std::strcmp(asked, "0") != 0;
  }

  // Begins at a huge page, so that it can be made of them.
  static void* map(uintptr_t bytes) {
    void* const mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    const auto begin = reinterpret_cast<uintptr_t>(mapped);
    const uintptr_t block = round_up(begin, kHugePage), end = begin + bytes + kHugePage;
    if (block > begin) munmap(mapped, block - begin);
    if (end > block + bytes) munmap(reinterpret_cast<void*>(block + bytes), end - block - bytes);
    madvise(reinterpret_cast<void*>(block), bytes, MADV_HUGEPAGE);  // if not, its pages are small
    return reinterpret_cast<void*>(block);
  }

  void hold(void* block, Held held) {
    held_.insert({block, held});
    held_bytes_ += held.bytes;
  }

  void unmap_idle(uint64_t calls) {
    for (auto it = idle_.begin(); it != idle_.end();) {
      if (calls_ - it->second.since < calls) {
        ++it;
        continue;
      }
      munmap(it->second.block, it->first);
      idle_bytes_ -= it->first;
      it = idle_.erase(it);
    }
  }

  bool on_;
  std::mutex lock_;
  uint64_t calls_ = 0;
  std::multimap<uintptr_t, Idle> idle_;  // by bytes
  std::unordered_map<const void*, Held> held_;
  uintptr_t idle_bytes_ = 0, held_bytes_ = 0;
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

void* take_block(int64_t bytes) { return Pool::the().take(bytes); }
void give_block(void* block, void*) { Pool::the().give(block); }
bool is_used_again(const void* block) { return Pool::the().is_used_again(block); }
void begin_call() { Pool::the().begin_call(); }
void pool_bytes(int64_t& held, int64_t& idle) { Pool::the().bytes(held, idle); }

#else

void advise_huge_pages(void*, int64_t) {}
void* take_block(int64_t) { return nullptr; }
void give_block(void*, void*) {}
bool is_used_again(const void*) { return false; }
void begin_call() {}
void pool_bytes(int64_t& held, int64_t& idle) { held = idle = 0; }

#endif

}  // namespace dfa
