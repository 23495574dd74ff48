// Memory of large signals, which is used again from step to step.
//
// The system clears each page that is touched for the first time, which takes longer than
// structured feedback takes to make what is written there. So the blocks of large outputs come from
// a pool, and return to it when their tensors are gone. A tensor is an ordinary one: nothing is
// handed out twice while it lives. The pool has at most as much memory as tensors held at once in
// recent calls.
#pragma once

#include <cstdint>

namespace dfa {

// Large outputs share huge pages where the system has them.
void advise_huge_pages(void* data, int64_t bytes);

constexpr int64_t kPooledBytes = 1 << 20;  // smaller outputs are left to the allocator

struct Block;

// A block of at least `bytes`, or null: if DFA_KERNELS_POOL is 0, or if there is no memory.
Block* take_block(int64_t bytes);

void* data_of(const Block* block);

// A tensor's deleter: returns the block to the pool.
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
