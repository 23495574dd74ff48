// Memory of large outputs.
#pragma once

#include <cstdint>

namespace dfa {

// Asks for huge pages behind a fresh output that is about to be written whole. Writing such an
// output otherwise costs one page fault per 4 KiB, more than making its entries. No effect off
// Linux.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace dfa
