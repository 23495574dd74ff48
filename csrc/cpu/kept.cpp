#include "kept.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>

#include "parallel.h"

namespace dfa {
namespace {

constexpr size_t kRemembered = 64;  // matrices that were asked for

struct Item {
  KeptKey key;
  int64_t bytes;
  std::shared_ptr<char> entries;  // null: asked for, but not kept
};

// Nobody waits for the lock: who does not get it makes the entries. So a child of a fork, which may
// find it held by a thread that it does not have, keeps nothing, and works.
struct Keeper {
  std::mutex lock;
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
  const std::unique_lock<std::mutex> guard(all.lock, std::try_to_lock);
  if (!guard.owns_lock()) return {};
  const auto item = all.find(key);
  if (item == all.items.end()) {
    all.items.push_front({key, bytes, nullptr});
    if (all.items.size() > kRemembered) all.items.pop_back();
    return {};
  }
  all.items.splice(all.items.begin(), all.items, item);
  if (item->entries != nullptr) return {item->entries, true};
  return {std::shared_ptr<char>(allocate(bytes)), false};
}

void keep(const KeptKey& key, const std::shared_ptr<char>& entries) {
  Keeper& all = keeper();
  const std::unique_lock<std::mutex> guard(all.lock, std::try_to_lock);
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
  const std::unique_lock<std::mutex> guard(all.lock, std::try_to_lock);
  if (!guard.owns_lock()) return 0;
  int64_t bytes = 0;
  for (const Item& item : all.items) bytes += item.entries == nullptr ? 0 : item.bytes;
  all.items.clear();
  return bytes;
}

}  // namespace dfa
