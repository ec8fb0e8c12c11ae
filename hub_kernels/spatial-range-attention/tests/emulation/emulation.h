// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
//
// Enough of CUDA to run the device code as host C++: blocks one after the other, the threads of a block as fibers, or
// with EMULATION_THREADS as OS threads for ThreadSanitizer. What it is strict about:
//   - shared memory starts as NaN and ends at an inaccessible page, as do the buffers of `Guarded`;
//   - an asynchronous copy puts NaN in its target at once and the data only when waited for;
//   - all threads of a block must reach the same __syncthreads, and none may be left waiting;
//   - 16-byte alignment of copies and fragment loads;
//   - lanes that exchange registers do not thereby see each other's memory (only __syncwarp and __syncthreads order it).
// A barrier can be left out, by the number of its line (`emulation::dropped_line`), or all waits for copies (-1).
// Not covered: timing, bank conflicts, limits of registers and grids, the inline PTX itself.

#ifndef EMULATION_H
#define EMULATION_H

#include <linux/futex.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __half2float(__half value) { return value.value; }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }

namespace emulation {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s\n", message);
  std::fflush(stderr);
  std::_Exit(3);
}

// Memory whose end is the end of the accessible: 16-byte aligned, every byte 0xff (NaN in all dtypes). Only the last
// `used` bytes of sparse memory are poisoned; the others take no space until they are touched.
class Guarded {
 public:
  explicit Guarded(size_t bytes, size_t used = SIZE_MAX) : bytes_(bytes), used_(used < bytes ? used : bytes) {
    constexpr size_t kPage = 4096;
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    const size_t usable = (bytes + kPage - 1) / kPage * kPage;
    mapped_ = usable + kPage;
    base_ = static_cast<unsigned char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, kFlags, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + usable, kPage, PROT_NONE) != 0) fail("no memory");
    data_ = base_ + (usable - bytes) / 16 * 16;
    poison();
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }
  void poison() { std::memset(data_ + bytes_ - used_, 0xff, used_); }
  unsigned char* data() const { return data_; }

 private:
  size_t bytes_, used_, mapped_;
  unsigned char *base_, *data_;
};

struct Index {
  unsigned x;
};

inline Index block_index, grid_size;
inline unsigned char* shared_memory;
inline int dropped_line = 0;
inline bool last_first = false;  // which fiber goes on: the one that waited longest, or the one that came last

inline std::atomic<int64_t> recomputed = 0;  // segments of results that neighbor_sum found not finite

constexpr unsigned kWarp = 32;

#if defined(EMULATION_THREADS)

// A barrier that ThreadSanitizer sees...
class Barrier {
 public:
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier_, nullptr, count); }
  Barrier(const Barrier&) = delete;
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait(int) { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

// ... and one that it does not, for exchanges of registers.
class Meeting {
 public:
  explicit Meeting(unsigned count) : count_(count) {}
  __attribute__((no_sanitize("thread"), noinline)) void wait(int) {
    const unsigned generation = __atomic_load_n(&generation_, __ATOMIC_SEQ_CST);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_SEQ_CST) == count_) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_SEQ_CST);
      __atomic_add_fetch(&generation_, 1, __ATOMIC_SEQ_CST);
      syscall(SYS_futex, &generation_, FUTEX_WAKE_PRIVATE, count_, nullptr, nullptr, 0);
    } else {
      while (__atomic_load_n(&generation_, __ATOMIC_SEQ_CST) == generation) {
        syscall(SYS_futex, &generation_, FUTEX_WAIT_PRIVATE, generation, nullptr, nullptr, 0);
      }
    }
  }

 private:
  unsigned count_, arrived_ = 0, generation_ = 0;
};

#else

struct Fiber;
inline std::deque<Fiber*> ready;
inline ucontext_t scheduler;

class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}
  void wait(int line);

 private:
  unsigned count_;
  int line_ = 0;
  std::vector<Fiber*> waiting_;
};
using Meeting = Barrier;

#endif

struct Warp {
  Barrier barrier{kWarp};
  Meeting meeting{kWarp};
  uint32_t words[2][kWarp][6];  // what lanes show each other; two, as a fast lane may be one exchange ahead
};

struct Copy {
  unsigned char* target;
  const void* source;
  bool inside;
};

struct Thread {
  Index index{};
  Warp* warp = nullptr;
  Barrier* block = nullptr;
  unsigned exchanges = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;

  Thread() = default;
  Thread(Index index, Warp* warp, Barrier* block) : index(index), warp(warp), block(block) {}
  unsigned lane() const { return index.x % kWarp; }
};

inline thread_local Thread* current = nullptr;

inline void block_barrier(int line) {
  if (line != dropped_line) current->block->wait(line);
}
inline void warp_barrier(int line) {
  if (line != dropped_line) current->warp->barrier.wait(line);
}

// Shows `count` words to the warp; returns those of all lanes.
__attribute__((no_sanitize("thread"), noinline)) inline const uint32_t (*exchange(const uint32_t* words, int count))[6] {
  Warp& warp = *current->warp;
  auto& slot = warp.words[current->exchanges++ % 2];
  const unsigned lane = current->index.x % kWarp;
  for (int i = 0; i < count; ++i) slot[lane][i] = words[i];
  warp.meeting.wait(-count);
  return slot;
}

#if !defined(EMULATION_THREADS)

struct Fiber {
  Thread thread;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  bool done = false;
};

inline const std::function<void()>* body;

inline void Barrier::wait(int line) {
  Fiber* self = reinterpret_cast<Fiber*>(current);
  if (waiting_.empty()) line_ = line;
  if (line != line_) fail("threads wait at different barriers");
  waiting_.push_back(self);
  if (waiting_.size() == count_) {
    ready.insert(ready.end(), waiting_.begin(), waiting_.end());
    waiting_.clear();
  }
  swapcontext(&self->context, &scheduler);
}

#endif

inline void finish_thread() {
  for (const auto& group : current->groups) {
    if (!group.empty()) fail("a thread ends before its copies have arrived");
  }
  if (!current->open.empty()) fail("a thread ends with copies that belong to no group");
}

// Runs `kernel` for the blocks from `first` on.
inline void run(unsigned first, unsigned blocks, unsigned threads, size_t shared_bytes,
                const std::function<void()>& kernel) {
  Guarded shared(shared_bytes);
  shared_memory = shared.data();
  grid_size.x = blocks;
#if defined(EMULATION_THREADS)
  Barrier block(threads), turn(threads);
  std::vector<std::unique_ptr<Warp>> warps;
  for (unsigned i = 0; i < threads / kWarp; ++i) warps.push_back(std::make_unique<Warp>());
  std::vector<std::thread> pool;
  for (unsigned i = 0; i < threads; ++i) {
    pool.emplace_back([&, i] {
      for (unsigned number = first; number < blocks; ++number) {
        if (i == 0) {
          block_index.x = number;
          shared.poison();
        }
        turn.wait(0);
        Thread thread({i}, warps[i / kWarp].get(), &block);
        current = &thread;
        kernel();
        finish_thread();
        turn.wait(0);
      }
    });
  }
  for (auto& thread : pool) thread.join();
#else
  constexpr size_t kStack = 128 * 1024;
  static std::vector<std::unique_ptr<Fiber>> fibers;
  while (fibers.size() < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack = std::make_unique<unsigned char[]>(kStack);
  }
  body = &kernel;
  for (block_index.x = first; block_index.x < blocks; ++block_index.x) {
    shared.poison();
    Barrier block(threads);
    std::vector<std::unique_ptr<Warp>> warps;
    for (unsigned i = 0; i < threads / kWarp; ++i) warps.push_back(std::make_unique<Warp>());
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers[i];
      fiber.thread = Thread({i}, warps[i / kWarp].get(), &block);
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, +[] {
        (*body)();
        finish_thread();
        reinterpret_cast<Fiber*>(current)->done = true;
      }, 0);
      ready.push_back(&fiber);
    }
    while (!ready.empty()) {
      Fiber* next = last_first ? ready.back() : ready.front();
      last_first ? ready.pop_back() : ready.pop_front();
      current = &next->thread;
      swapcontext(&scheduler, &next->context);
    }
    for (unsigned i = 0; i < threads; ++i) {
      if (!fibers[i]->done) fail("a thread waits at a barrier that others never reach");
    }
  }
#endif
}

}  // namespace emulation

#define threadIdx (::emulation::current->index)
#define blockIdx (::emulation::block_index)
#define gridDim (::emulation::grid_size)
#define __syncthreads() ::emulation::block_barrier(__LINE__)
#define __syncwarp() ::emulation::warp_barrier(__LINE__)
#define SPATIAL_RANGE_ATTENTION_SHARED(name) unsigned char* name = ::emulation::shared_memory
#define SPATIAL_RANGE_ATTENTION_RECOMPUTES() ++::emulation::recomputed

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int) {
  uint32_t words[2] = {};
  std::memcpy(words, &value, sizeof(T));
  const unsigned other = ::emulation::current->lane() ^ mask;
  const auto* all = ::emulation::exchange(words, 2);
  std::memcpy(&value, all[other], sizeof(T));
  return value;
}

#define __shfl_xor(value, mask, width) __shfl_xor_sync(0xffffffffu, value, mask, width)  // as HIP has it

// ---- mma.cuh, in the words of the PTX manual ----

#define SPATIAL_RANGE_ATTENTION_MMA_CUH

namespace spatial_range_attention::device {

inline void check_alignment(const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) ::emulation::fail("an address is not a multiple of 16");
}

inline void copy_async(void* target, const void* source, bool inside) {
  check_alignment(target);
  check_alignment(source);
  std::memset(target, 0xff, 16);
  ::emulation::current->open.push_back({static_cast<unsigned char*>(target), source, inside});
}

inline void copy_async_commit() {
  auto& thread = *::emulation::current;
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

template <int PENDING>
void copy_async_wait() {
  if (::emulation::dropped_line == -1) return;
  auto& groups = ::emulation::current->groups;
  for (; groups.size() > PENDING; groups.pop_front()) {
    for (const auto& copy : groups.front()) {
      if (copy.inside) {
        std::memcpy(copy.target, copy.source, 16);
      } else {
        std::memset(copy.target, 0, 16);
      }
    }
  }
}

// Row `lane` of the 32 rows that the lanes point at is shown to all; matrix i consists of rows 8i to 8i + 7.
inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
  check_alignment(row);
  uint32_t words[4];
  std::memcpy(words, row, 16);
  const unsigned lane = ::emulation::current->lane();
  const auto* rows = ::emulation::exchange(words, 4);
  for (int i = 0; i < 4; ++i) fragment[i] = rows[8 * i + lane / 4][lane % 4];
}

inline void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
  check_alignment(row);
  uint32_t words[4];
  std::memcpy(words, row, 16);
  const unsigned lane = ::emulation::current->lane();
  const auto* rows = ::emulation::exchange(words, 4);
  const auto element = [&](unsigned r, unsigned c) { return rows[r][c / 2] >> (c % 2 * 16) & 0xffff; };
  for (int i = 0; i < 4; ++i) {
    const unsigned r = 8 * i + lane % 4 * 2, c = lane / 4;
    fragment[i] = element(r, c) | element(r + 1, c) << 16;
  }
}

inline uint32_t round_to_tf32(float value) {  // to nearest, halves away from zero
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fffe000;
  if (std::isinf(value)) return bits;
  return (bits + 0x1000) & 0xffffe000;
}

template <typename T>
double element_of(uint32_t word, unsigned half) {
  if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float(word & 0xffffe000);  // the other bits are ignored
  } else if constexpr (std::is_same_v<T, __half>) {
    return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(word >> (16 * half))));
  } else {
    return __bfloat162float({static_cast<uint16_t>(word >> (16 * half))});
  }
}

// 16-bit elements, m16n8k16: A(r, k) is in lane r % 8 · 4 + k % 8 / 2, word r / 8 + k / 8 · 2, half k % 2;
//                            B(k, c) is in lane c · 4 + k % 8 / 2, word k / 8, half k % 2.
// TF32, m16n8k8: A(r, k) is in lane r % 8 · 4 + k % 4, word r / 8 + k / 4 · 2; B(k, c) in lane c · 4 + k % 4, word k / 4.
template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool kTf32 = std::is_same_v<T, float>;
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned lane = ::emulation::current->lane();
  const auto* all = ::emulation::exchange(words, 6);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned r = lane / 4 + i / 2 * 8, c = lane % 4 * 2 + i % 2;
    double total = sum[i];
    for (unsigned k = 0; k < (kTf32 ? 8 : 16); ++k) {
      const unsigned within = kTf32 ? k % 4 : k % 8 / 2, part = kTf32 ? k / 4 : k / 8;
      total += element_of<T>(all[r % 8 * 4 + within][r / 8 + part * 2], k % 2) *
               element_of<T>(all[c * 4 + within][4 + part], k % 2);
    }
    sum[i] = static_cast<float>(total);
  }
}

}  // namespace spatial_range_attention::device

#endif  // EMULATION_H
