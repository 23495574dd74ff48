// The maps from U's columns to the operands of mma.m16n8k16, and from the error to shared memory.
// The kernels and the host tests use the same functions.
//
// The order of a sum's terms is free. Over a strip of 32 columns, the contraction of two m16n8k16
// steps is therefore permuted: lane quad q = lane % 4 owns columns 8q .. 8q + 7, those of one
// Philox block of a row. Word w of the block becomes register pair w % 2 of step w / 2. The
// matching elements of the error are the 16 bytes of its columns 8q .. 8q + 7.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace dfa {

constexpr int kStripColumns = 32;               // columns of U per pair of steps
constexpr int kChunkColumns = 64;               // columns of the error staged together
constexpr int kChunkBytes = 2 * kChunkColumns;  // of one error row
constexpr int kPieces = kChunkBytes / 16;       // 16-byte pieces of it
constexpr int kFragmentRows = 16;               // rows of U in one A operand
constexpr int kFragmentBatch = 8;               // rows of the error in one B operand

// The row of a fragment that `lane` makes, for half 0 or 1.
DFA_HOST_DEVICE constexpr int fragment_row(int lane, int half) { return lane / 4 + 8 * half; }

// The A register of (half of the rows, pair of columns).
DFA_HOST_DEVICE constexpr int a_register(int half, int pair) { return half + 2 * pair; }

// The Philox word that holds a lane's columns of `step` and `pair`.
DFA_HOST_DEVICE constexpr int word_of(int step, int pair) { return 2 * step + pair; }

// The column in a strip of half `half` of word `word`, in lane quad `quad`.
DFA_HOST_DEVICE constexpr int column_of(int quad, int word, int half) {
  return 8 * quad + 2 * word + half;
}

// The byte of 16-byte piece `piece` of error row `row` in a staged chunk. Every other row swaps its
// halves, so that the 8 lanes of one shared-memory access touch every bank once.
DFA_HOST_DEVICE constexpr int staged_byte(int row, int piece) {
  return row * kChunkBytes + 16 * (piece ^ ((row & 1) << 2));
}

// The same for a warpgroup's product, whose hardware reads rows so: 8 of them use every bank once.
DFA_HOST_DEVICE constexpr int group_byte(int row, int piece) {
  return row * kChunkBytes + 16 * (piece ^ (row & 7));
}

// A warpgroup's product reads the second operand's columns in their order, so the error's are
// permuted beforehand: the column in a strip of its element `position`.
DFA_HOST_DEVICE constexpr int group_column(int position) {
  const int quad = position % 8 / 2, word = position / 8;
  return column_of(quad, word, position % 2);
}

// The error row and the row of U of accumulator i of `lane`, within a fragment.
DFA_HOST_DEVICE constexpr int sum_batch(int lane, int i) { return 2 * (lane % 4) + i % 2; }
DFA_HOST_DEVICE constexpr int sum_row(int lane, int i) { return fragment_row(lane, i / 2); }

}  // namespace dfa
