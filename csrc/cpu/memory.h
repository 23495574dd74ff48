// Memory of signals, which is used again from step to step.
//
// The system clears each page that is touched for the first time, which takes longer than
// structured feedback takes to make what is written there. So the blocks of outputs come from a
// pool, and return to it when their tensors are gone. A large output has a block of its own; small
// ones of one call share blocks. A tensor is an ordinary one: nothing is handed out twice while it
// lives. The pool has at most as much memory as tensors held at once in recent calls.
#pragma once

#include <cstdint>

namespace dfa {

// Large outputs share huge pages where the system has them.
void advise_huge_pages(void* data, int64_t bytes);

constexpr int64_t kLargeBytes = 1 << 20;    // of an output with a block of its own
constexpr int64_t kPooledBytes = 64 << 10;  // small outputs that together take less have no block
constexpr int64_t kSharedBytes = 2 << 20;   // of a block of small ones: the last holds all of it

// What an output takes of a block: no cache line belongs to two.
constexpr int64_t part_bytes(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Block;

// A block of at least `bytes` for some tensors, or null: if DFA_KERNELS_POOL is 0, if there is no
// memory, or if tensors hold so many blocks that another small one would not do.
Block* take_block(int64_t bytes, int64_t tensors);

void* data_of(const Block* block);

// A tensor's deleter: the last one returns the block to the pool.
void give_block(void* data, void* block);

// Whether an earlier tensor has had this memory, so that the system need not clear it.
bool is_used_again(const void* data);

// Begins a call that may take blocks.
void begin_call();

// The pool's blocks: how many bytes tensors hold, and how many are idle.
void pool_bytes(int64_t& held, int64_t& idle);

// Gives idle blocks back to the system; returns their bytes.
int64_t empty_pool();

}  // namespace dfa
