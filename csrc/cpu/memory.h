// The memory of large outputs.
#pragma once

#include <cstdint>

namespace dfa {

// Asks for huge pages behind a new output that will be written whole. Without them, the page faults
// (one per 4 KiB) cost more than making the entries. Does nothing off Linux.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace dfa
