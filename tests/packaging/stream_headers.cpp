// Prints what the stream's headers compute: three Philox vectors, the 4096 codebook patterns, and
// for seed 0 an entry of each distribution in rows 0 and 1, columns 0..3, and its facts.
#include <cstdio>

#include "../../csrc/entries.h"

#if defined(__CUDACC__)
__global__ void entries_on_device(float* out) {
  out[0] = dfa::normal_entry(1, threadIdx.x, 2);
  out[1] = static_cast<float>(dfa::uniform_lattice(1, threadIdx.x, 2));
  out[2] = static_cast<float>(dfa::rademacher_entry(1, threadIdx.x, 2));
}
#endif

int main() {
  const uint32_t inputs[3][6] = {
      {0, 0, 0, 0, 0, 0},
      {~0u, ~0u, ~0u, ~0u, ~0u, ~0u},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0}};
  for (const auto& in : inputs) {
    const dfa::Words4 out = dfa::philox4x32(in[0], in[1], in[2], in[3], in[4], in[5]);
    for (uint32_t word : out.word) std::printf("%08x ", word);
    std::printf("\n");
  }
  for (uint32_t k = 0; k < dfa::kCodebookSize; ++k) std::printf("%04x ", dfa::codebook(k));
  std::printf("\n");
  for (uint64_t row = 0; row < 2; ++row) {
    for (uint64_t c = 0; c < 4; ++c) {
      std::printf("%04x %d %d ", dfa::bfloat16_bits(dfa::normal_entry(0, row, c)),
                  dfa::uniform_lattice(0, row, c), dfa::rademacher_entry(0, row, c));
    }
  }
  std::printf("\n");
  for (int i = 0; i < dfa::kDense; ++i) {
    const dfa::DistributionFacts facts = dfa::facts(dfa::Distribution(i));
    std::printf("%s %d %d %.17g ", facts.name, facts.block, facts.bits, facts.factor);
  }
  std::printf("\n");
}
