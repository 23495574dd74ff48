// Memory of large signals, which is used again from step to step.
//
// The system clears each page that is touched for the first time, which takes longer than
// structured feedback takes to make what is written there. So the blocks of large outputs come from
// a pool, and return to it when their tensors are gone. A tensor is an ordinary one: nothing is
// handed out twice while it lives.
#pragma once

#include <cstdint>

namespace dfa {

// Large outputs share huge pages where the system has them.
void advise_huge_pages(void* data, int64_t bytes);

// A block of at least `bytes`, or null: for small outputs, if DFA_KERNELS_POOL is 0, or if there is
// no memory. Blocks that no call has taken for some calls go back to the system.
void* take_block(int64_t bytes);

// Returns a block. Its type is that of a tensor's deleter.
void give_block(void* block, void*);

// Whether this is a block that an earlier tensor has had, so that the system need not clear it.
bool is_used_again(const void* block);

// Begins a call that may take blocks.
void begin_call();

// The pool's blocks: how many bytes tensors hold, and how many are idle.
void pool_bytes(int64_t& held, int64_t& idle);

}  // namespace dfa
