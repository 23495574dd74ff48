// Rounding of fp64 to 16 bits by way of fp32, in one place for host and device.
#pragma once

#include <cstring>

#include "philox.h"

namespace dfa {
namespace {

// A float that rounds to any shorter type as `value` would: an inexact one is made odd.
DFA_HOST_DEVICE float to_odd(double value) {
  float nearest = static_cast<float>(value);
  const double back = static_cast<double>(nearest);
  uint32_t bits;
  std::memcpy(&bits, &nearest, sizeof bits);
  if (value == value && back != value && bits % 2 == 0) {
    const bool beyond = value < 0 ? value > back : value < back;  // the float is
    bits += beyond ? ~0u : 1u;
  }
  std::memcpy(&nearest, &bits, sizeof bits);
  return nearest;
}

}  // namespace
}  // namespace dfa
