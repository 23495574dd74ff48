// The names of csrc/cuda/device.h, on the host. Blocks run one after another; their threads are
// fibers that stop at every barrier and warp operation. It is built to find mistakes:
//
// - All 32 lanes must meet at the same warp operation. A block that cannot go on fails.
// - Shared memory begins as NaN, in an allocation of its exact size.
// - Asynchronous copies are made at once, or with DFA_EMULATE_LATE as late as the program allows.
// - Threads run in order, or with DFA_EMULATE_BACKWARDS backwards. Warps run together, or with
//   DFA_EMULATE_APART each as far as it can before the next.
// - A launch that asks for too much shared memory fails.
// - The approximate logarithm errs by up to 2^-18, in either direction.
// - Tensor cores cut their sums off, without rounding, after each 16 products.
//
// It cannot see a missing sync_warp before or after a vote or a shuffle, because here these order
// memory. compute-sanitizer sees that.
#pragma once

#include <sanitizer/asan_interface.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define DFA_DEVICE inline
#define DFA_KERNEL(threads, blocks) void
#define DFA_ARGUMENT const

namespace dfa {

struct alignas(16) Words16 {
  uint32_t x, y, z, w;
};

namespace device {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  bool valid;

  void make() const {
    if (valid) {
      std::memcpy(to, from, 16);
    } else {
      std::memset(to, 0, 16);
    }
  }
};

// All threads of a group wait for each other. The last to arrive does the work of all.
struct Meeting {
  int size, arrived = 0;
  unsigned round = 0;
  const char* kind = nullptr;
};

// The stack of a fiber. Those of ended fibers are reused, because new memory is slow.
class Stack {
 public:
  static constexpr size_t kSize = 32 << 10;

  Stack() {
    if (free().empty()) free().emplace_back(new char[kSize]);
    memory = std::move(free().back());
    free().pop_back();
    __asan_unpoison_memory_region(memory.get(), kSize);  // the frames of the last fiber
  }
  Stack(Stack&&) = default;
  ~Stack() {
    if (memory) free().push_back(std::move(memory));
  }
  char* get() const { return memory.get(); }

 private:
  static std::vector<std::unique_ptr<char[]>>& free() {
    static std::vector<std::unique_ptr<char[]>> stacks;
    return stacks;
  }
  std::unique_ptr<char[]> memory;
};

struct Fiber {
  Stack stack;
  ucontext_t context;
  void* fake_stack = nullptr;
  bool done = false;
  const Meeting* waits = nullptr;  // for its round to end
  unsigned round = 0;
  std::vector<Copy> copies;
};

struct Lane {
  float* sums;
  const uint32_t* a;
  uint32_t value, b[2];
};

// The running block.
struct Block {
  int threads, index, count, current = 0, living = 0;
  std::function<void()> program;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps, groups;
  std::vector<Lane> lanes;
  Meeting all;
  std::unique_ptr<Words16[]> shared;
  ucontext_t scheduler;
  const void* main_stack = nullptr;
  size_t main_size = 0;
  bool moved = false, late = false;
};

inline Block* running = nullptr;

inline void yield() {
  Block& b = *running;
  Fiber& f = b.fibers[static_cast<size_t>(b.current)];
  __sanitizer_start_switch_fiber(f.done ? nullptr : &f.fake_stack, b.main_stack, b.main_size);
  swapcontext(&f.context, &b.scheduler);
  __sanitizer_finish_switch_fiber(f.fake_stack, &b.main_stack, &b.main_size);
}

template <class Last>
void meet(Meeting& m, const char* kind, const Last& last) {
  if (m.arrived > 0 && std::strcmp(m.kind, kind) != 0) fail("threads meet at different operations");
  m.kind = kind;
  const unsigned round = m.round;
  running->moved = true;
  if (++m.arrived == m.size) {
    last();
    m.arrived = 0;
    ++m.round;
    return;
  }
  Fiber& f = running->fibers[static_cast<size_t>(running->current)];
  f.waits = &m;
  f.round = round;
  yield();
  f.waits = nullptr;
}

inline int thread() { return running->current; }
inline int block() { return running->index; }
inline int blocks() { return running->count; }
inline char* shared() { return reinterpret_cast<char*>(running->shared.get()); }
inline Meeting& warp() { return running->warps[static_cast<size_t>(thread() / 32)]; }
inline Lane* lanes() { return &running->lanes[static_cast<size_t>(thread() / 32 * 32)]; }

inline void sync_block() {
  meet(running->all, "sync_block", [] {});
}
inline void sync_warp() {
  meet(warp(), "sync_warp", [] {});
}

inline uint32_t ballot(bool holds) {
  Lane* const lane = lanes();
  lane[thread() % 32].value = holds;
  meet(warp(), "ballot", [lane] {
    uint32_t mask = 0;
    for (int i = 0; i < 32; ++i) mask |= lane[i].value << i;
    for (int i = 0; i < 32; ++i) lane[i].value = mask;
  });
  return lane[thread() % 32].value;
}

inline uint32_t shuffle(uint32_t value, int from) {
  Lane* const lane = lanes();
  lane[thread() % 32].value = value;
  lane[thread() % 32].b[0] = static_cast<uint32_t>(from);
  meet(warp(), "shuffle", [lane] {
    for (int i = 0; i < 32; ++i) lane[i].b[1] = lane[lane[i].b[0] % 32].value;
  });
  return lane[thread() % 32].b[1];
}

inline int lowest_bit(uint32_t mask) { return __builtin_ctz(mask); }

inline void copy_async(void* to, const void* from, bool valid) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(shared());
  if (offset % 16 != 0) fail("copy to an unaligned place");
  // Also if not valid: a GPU forms the address too.
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("copy from an unaligned place");
  const Copy copy{to, from, valid};
  if (running->late) {
    running->fibers[static_cast<size_t>(thread())].copies.push_back(copy);
  } else {
    copy.make();
  }
}

inline void wait_copies() {
  auto& copies = running->fibers[static_cast<size_t>(thread())].copies;
  for (const Copy& copy : copies) copy.make();
  copies.clear();
}

inline float half_value(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof bits);
  return static_cast<float>(value);
}

// As tensor cores round: towards zero.
inline float cut_off(double sum) {
  const float nearest = static_cast<float>(sum);
  const bool beyond = std::isfinite(sum) && std::fabs(double{nearest}) > std::fabs(sum);
  return beyond ? std::nextafterf(nearest, 0.0f) : nearest;
}

// Operands are laid out as in the PTX manual, for mma.m16n8k16 with 16-bit types.
template <class Value>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* kind,
              const Value& value) {
  Lane* const lane = lanes();
  Lane& own = lane[thread() % 32];
  own.sums = c;
  own.a = a;
  own.b[0] = b0;
  own.b[1] = b1;
  meet(warp(), kind, [&] {
    float left[16][16], right[16][8];
    for (int i = 0; i < 32; ++i) {
      const int group = i / 4, in_group = i % 4;
      for (int e = 0; e < 8; ++e) {  // a0 .. a7
        const int row = e % 4 < 2 ? group : group + 8;
        const int column = in_group * 2 + e % 2 + (e >= 4 ? 8 : 0);
        left[row][column] = value(static_cast<uint16_t>(lane[i].a[e / 2] >> (16 * (e % 2))));
      }
      for (int e = 0; e < 4; ++e) {  // b0 .. b3
        const int row = in_group * 2 + e % 2 + (e >= 2 ? 8 : 0);
        right[row][group] = value(static_cast<uint16_t>(lane[i].b[e / 2] >> (16 * (e % 2))));
      }
    }
    for (int i = 0; i < 32; ++i) {
      for (int e = 0; e < 4; ++e) {  // c0 .. c3
        const int row = i / 4 + (e >= 2 ? 8 : 0), column = i % 4 * 2 + e % 2;
        double sum = lane[i].sums[e];
        for (int k = 0; k < 16; ++k) sum += double{left[row][k]} * double{right[k][column]};
        lane[i].sums[e] = cut_off(sum);
      }
    }
  });
}

inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply(c, a, b0, b1, "multiply_bf16", bfloat16_value);
}
inline void multiply_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply(c, a, b0, b1, "multiply_half", half_value);
}

inline void show_copies() {}

constexpr bool kHasWarpgroups = true;
inline void trap() { fail("a kernel that is not for this GPU"); }

// As the hardware reads them: rows of 128 bytes whose pieces of 16 are permuted by the row's
// number. All four warps must come, though each has rows of its own.
template <int N>
void multiply_group(float (&c)[N][4], const uint32_t (&a)[2][4], const char* rows, int byte,
                    bool is_half) {
  if ((rows - shared()) % 1024 != 0) fail("rows of a warpgroup's product at an unaligned place");
  const auto value = [is_half](uint32_t bits) {
    const auto half = static_cast<uint16_t>(bits);
    return is_half ? half_value(half) : bfloat16_value(half);
  };
  Lane* const lane = lanes();
  const int group = thread() % 32 / 4, in_group = thread() % 4;
  lane[thread() % 32].a = a[0];
  meet(running->groups[static_cast<size_t>(thread() / 128)], "multiply_group", [] {});
  for (int step = 0; step < 2; ++step) {
    float left[2][16];  // this lane's two rows
    for (int quad = 0; quad < 4; ++quad) {
      const uint32_t* const of_quad = lane[4 * group + quad].a + 4 * step;
      for (int e = 0; e < 8; ++e) {
        const int column = quad * 2 + e % 2 + (e >= 4 ? 8 : 0);
        left[e % 4 / 2][column] = value(of_quad[e / 2] >> (16 * (e % 2)));
      }
    }
    for (int n = 0; n < N; ++n) {
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * n + 2 * in_group + e % 2;
        double sum = c[n][e];
        for (int k = 0; k < 16; ++k) {
          const int at = byte + 32 * step + 2 * k;
          uint16_t bits;
          std::memcpy(&bits, rows + row * 128 + (at / 16 ^ row % 8) * 16 + at % 16, 2);
          sum += double{left[e / 2][k]} * double{value(bits)};
        }
        c[n][e] = cut_off(sum);
      }
    }
  }
  meet(warp(), "multiply_group", [] {});
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float rounded_product(float a, float b) { return a * b; }
inline double rounded_product(double a, double b) { return a * b; }

inline float log2_approximate(float x) {
  return std::log2f(x) + (as_bits(x) / 8 % 2 == 0 ? 0x1p-18f : -0x1p-18f);
}

inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    picked |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return picked;
}

inline uint32_t pack_bf16(float low, float high) {
  const auto bits = [](float x) { return std::isnan(x) ? uint32_t{0x7fff} : bfloat16_bits(x); };
  return bits(low) | bits(high) << 16;
}
inline uint32_t pack_half(float low, float high) {
  const _Float16 pair[] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return bits;
}

template <class T>
void store_streaming(T* to, T value) {
  *to = value;
}
inline void store16(void* to, Words16 words) { *static_cast<Words16*>(to) = words; }

inline void enter() {
  Block& b = *running;
  __sanitizer_finish_switch_fiber(nullptr, &b.main_stack, &b.main_size);
  b.program();
  Fiber& f = b.fibers[static_cast<size_t>(b.current)];
  if (!f.copies.empty()) fail("a thread ends with copies under way");
  f.done = b.moved = true;
  --b.living;
  yield();
}

inline void run(Block& b) {
  const bool backwards = std::getenv("DFA_EMULATE_BACKWARDS") != nullptr;
  running = &b;
  b.living = b.threads;
  for (Fiber& f : b.fibers) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = Stack::kSize;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  // Threads that run together, as long as one of them can.
  const int together = std::getenv("DFA_EMULATE_APART") != nullptr ? 32 : b.threads;
  while (b.living > 0) {
    bool moved = false;
    for (int first = 0; first < b.threads; first += together) {
      do {
        b.moved = false;
        for (int i = first; i < first + together; ++i) {
          b.current = backwards ? b.threads - 1 - i : i;
          Fiber& f = b.fibers[static_cast<size_t>(b.current)];
          if (f.done || (f.waits != nullptr && f.waits->round == f.round)) continue;
          void* fake_stack = nullptr;
          __sanitizer_start_switch_fiber(&fake_stack, f.stack.get(), Stack::kSize);
          swapcontext(&b.scheduler, &f.context);
          __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
        }
        moved |= b.moved;
      } while (b.moved && together < b.threads);
    }
    if (!moved) fail("threads wait for each other for ever");
  }
}

}  // namespace device

struct DeviceLimits {
  int processors, shared_bytes;
  bool warpgroups;
};

struct Device {
  DeviceLimits limits;
  int warps;      // per multiprocessor
  bool launches;  // false: only records what would be launched
};

// Few of everything, so that blocks take several tiles in turn. The shared memory of an sm_86.
inline Device emulated{{3, 99 << 10, false}, 4, true};

inline DeviceLimits device_limits() { return emulated.limits; }

template <class Parameters>
int resident_blocks(void (*)(Parameters), int threads, int shared_bytes) {
  constexpr int kReserved = 1 << 10;  // by CUDA, for each block
  const int by_memory = (emulated.limits.shared_bytes + kReserved) / (shared_bytes + kReserved);
  return std::min(std::max(1, emulated.warps / (threads / 32)), by_memory);
}

// The number of launches, and the kernel and blocks of the last one.
inline int launches = 0;
inline const void* last_kernel = nullptr;
inline int64_t last_blocks = 0;

template <class Parameters>
void launch(void (*kernel)(Parameters), const Parameters& parameters, int64_t blocks, int threads,
            int shared_bytes, void*) {
  ++launches;
  last_kernel = reinterpret_cast<const void*>(kernel);
  last_blocks = blocks;
  if (blocks < 1 || blocks > INT32_MAX) device::fail("a grid of no size that a GPU takes");
  if (shared_bytes > device_limits().shared_bytes) device::fail("too much shared memory");
  for (int64_t i = 0; i < blocks && emulated.launches; ++i) {
    device::Block b{};
    b.threads = threads;
    b.index = static_cast<int>(i);
    b.count = static_cast<int>(blocks);
    b.program = [&] { kernel(parameters); };
    b.fibers = std::vector<device::Fiber>(static_cast<size_t>(threads));
    b.lanes.resize(static_cast<size_t>(threads));
    b.warps.assign(static_cast<size_t>(threads / 32), {32});
    b.groups.assign(static_cast<size_t>(threads / 128), {128});
    b.all = {threads};
    b.late = std::getenv("DFA_EMULATE_LATE") != nullptr;
    b.shared.reset(new Words16[static_cast<size_t>(shared_bytes) / 16]);
    std::memset(b.shared.get(), 0xff, static_cast<size_t>(shared_bytes));
    device::run(b);
  }
}

}  // namespace dfa
