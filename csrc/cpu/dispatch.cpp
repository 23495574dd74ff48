#include <atomic>
#include <cstring>

#include "kernels.h"

namespace dfa {
namespace {

std::atomic<const Kernels*> forced{nullptr};

const Kernels& best() {
  static const Kernels* const table = [] {
    if (const Kernels* k = kernels_avx512_bf16(); k != nullptr && has_fast_bf16()) return k;
    if (const Kernels* k = kernels_avx512()) return k;
    if (const Kernels* k = kernels_avx2()) return k;
    return kernels_portable();
  }();
  return *table;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* k = forced.load(std::memory_order_relaxed);
  return k ? *k : best();
}

bool force_kernels(const char* name) {
  const Kernels* chosen = nullptr;
  if (*name != '\0') {
    for (const Kernels* k :
         {kernels_avx512_bf16(), kernels_avx512(), kernels_avx2(), kernels_portable()}) {
      if (k != nullptr && std::strcmp(k->name, name) == 0) chosen = k;
    }
    if (chosen == nullptr) return false;
  }
  forced.store(chosen, std::memory_order_relaxed);
  return true;
}

}  // namespace dfa
