#include "kept.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>

namespace dfa {
namespace {

constexpr uintptr_t kLine = 64;  // entries begin at a cache line
constexpr std::chrono::seconds kDropPatience{1};
constexpr size_t kRemembered = 64;  // matrices that were asked for

struct Item {
  KeptKey key;
  int64_t bytes;
  std::shared_ptr<char> entries;  // null: asked for, but not kept
};

// No projection waits for the lock: who does not get it makes the entries. So a child of a fork,
// which may find it held by a thread that it does not have, keeps nothing, and works.
struct Keeper {
  std::timed_mutex lock;
  std::list<Item> items;  // the one asked for last is first
  const bool on = [] {
    const char* const asked = std::getenv("DFA_KERNELS_KEEP");
    return asked == nullptr || std::strcmp(asked, "0") != 0;
  }();

  std::list<Item>::iterator find(const KeptKey& key) {
    return std::find_if(items.begin(), items.end(),
                        [&](const Item& item) { return item.key == key; });
  }
};

Keeper& keeper() {  // never destroyed: threads may outlive everything
  static Keeper* const the = new Keeper;
  return *the;
}

}  // namespace

Kept find_kept(const KeptKey& key, int64_t bytes) {
  Keeper& all = keeper();
  if (!all.on) return {};
  const std::unique_lock<std::timed_mutex> guard(all.lock, std::try_to_lock);
  if (!guard.owns_lock()) return {};
  const auto item = all.find(key);
  if (item == all.items.end()) {
    all.items.push_front({key, bytes, nullptr});
    if (all.items.size() > kRemembered) all.items.pop_back();
    return {};
  }
  all.items.splice(all.items.begin(), all.items, item);
  if (item->entries != nullptr) return {item->entries, true};
  // Not by aligned `new`: blocks of it that live for long leave holes that it does not fill again.
  const std::shared_ptr<char> memory(new char[static_cast<size_t>(bytes) + kLine],
                                     std::default_delete<char[]>());
  const auto misplaced = reinterpret_cast<uintptr_t>(memory.get()) % kLine;
  return {std::shared_ptr<char>(memory, memory.get() + (kLine - misplaced)), false};
}

void keep(const KeptKey& key, const std::shared_ptr<char>& entries) {
  Keeper& all = keeper();
  const std::unique_lock<std::timed_mutex> guard(all.lock, std::try_to_lock);
  if (!guard.owns_lock()) return;
  const auto kept = all.find(key);
  if (kept == all.items.end()) return;
  kept->entries = entries;
  all.items.splice(all.items.begin(), all.items, kept);
  // One that goes must be asked for twice again, so that too many by turns are not all made to
  // keep.
  int64_t bytes = 0;
  all.items.remove_if([&](const Item& item) {
    if (item.entries != nullptr) bytes += item.bytes;
    return item.entries != nullptr && bytes > kKeptBytes;
  });
}

int64_t drop_kept() {
  Keeper& all = keeper();
  const std::unique_lock<std::timed_mutex> guard(all.lock, kDropPatience);
  if (!guard.owns_lock()) return 0;
  int64_t bytes = 0;
  for (const Item& item : all.items) bytes += item.entries == nullptr ? 0 : item.bytes;
  all.items.clear();
  return bytes;
}

}  // namespace dfa
