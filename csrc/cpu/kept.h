// Entries of small matrices, kept from call to call.
//
// To make a normal entry takes longer than to read it. So the second call that asks for the same
// rows and columns of a stream keeps them, in bf16, and later ones read them. What one call alone
// asks for is never kept. Signals are the same bits either way. Uniform entries are not kept: they
// gain only while they stay in the caches between calls.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../entries.h"

namespace dfa {

constexpr int64_t kKeptMatrixBytes = 2 << 20;  // of one matrix, at most
constexpr int64_t kKeptBytes = 4 << 20;        // of all; those read last stay

// Consecutive rows, and the number of their first panel.
struct KeptRows {
  uint64_t row;
  int64_t rows;
  int64_t panel;

  bool operator==(const KeptRows& other) const {
    return row == other.row && rows == other.rows && panel == other.panel;
  }
};

// Everything that the bytes of a matrix follow from.
struct KeptKey {
  const void* kernels;  // the table that made them
  uint64_t seed;
  Distribution distribution;
  int64_t unit, units;  // columns
  std::vector<KeptRows> rows;

  bool operator==(const KeptKey& other) const {
    return kernels == other.kernels && seed == other.seed && distribution == other.distribution &&
           unit == other.unit && units == other.units && rows == other.rows;
  }
};

// Entries that are kept, which nobody writes any more, or memory for those to keep. Null if this
// call is the first to ask, if DFA_KERNELS_KEEP is 0, or if another thread is just asking.
struct Kept {
  std::shared_ptr<char> entries;
  bool made = false;
};
Kept find_kept(const KeptKey& key, int64_t bytes);

// Keeps entries that are now made.
void keep(const KeptKey& key, const std::shared_ptr<char>& entries);

// Forgets all; returns the bytes. A call that still reads some frees them when it ends.
int64_t drop_kept();

}  // namespace dfa
