// The simulated device of cuda_host.h. Compiled without sanitizers: it is the machine, not the
// program that runs on it, and says to the sanitizers by hand what its fibers do.

#include "cuda_host.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

// Present where the sanitizer is.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* stack,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* saved, const void** old_stack,
                                                           size_t* old_size);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void AnnotateIgnoreWritesBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesEnd(const char* file, int line);
}

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace neusemslice::cuda::host {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned kNoSync = 1;  // __tsan_switch_to_fiber_no_sync

void acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}
void release(void* address) {
  if (__tsan_release) __tsan_release(address);
}

enum class State { kReady, kBarrier, kWarp, kDone };

struct Thread {
  unsigned index;
  State state;
  Where where;
  unsigned mask;
  uint64_t value;
  uint64_t values[kWarp];
  int barriers;  // passed so far: two in a row use different addresses to synchronise at
  int warp_barriers;
  char sync[2];  // addresses that warp barriers synchronise at
};

// A stack and what runs on it: the thread that it is given, then the next one.
struct Fiber {
  ucontext_t context;
  void* stack;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  Thread* thread = nullptr;
};

struct Shared {
  const void* key;
  void* bytes;
};

struct Device {
  unsigned seed = 0;
  ucontext_t scheduler;
  void* scheduler_tsan = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  Fiber* fibers[kMaxThreads] = {};
  Fiber* running = nullptr;

  const char* kernel = "";
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  Thread threads[kMaxThreads];
  int thread_count = 0;
  int64_t dynamic_size = 0;
  Shared shared[64];
  int shared_count = 0;
  char start_sync, end_sync, block_sync[2];
};

Device device;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "%s, block (%u, %u): %s\n", device.kernel, blockIdx.x, blockIdx.y,
               message.c_str());
  std::fflush(nullptr);
  std::_Exit(EXIT_FAILURE);
}

std::string describe(const Thread& thread) {
  const std::string name = "thread " + std::to_string(thread.index);
  if (thread.state == State::kDone) return name + " has ended";
  if (thread.state == State::kReady) return name + " is running";
  std::string file = thread.where.file_name();
  file = file.substr(file.find_last_of('/') + 1);
  return name + (thread.state == State::kBarrier ? " waits for the block" : " waits for its warp") +
         " at " + file + ":" + std::to_string(thread.where.line());
}

// From a thread to the scheduler, until the scheduler comes back.
void leave(Fiber& fiber) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&fiber.fake_stack, device.scheduler_stack,
                                   device.scheduler_stack_size);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(device.scheduler_tsan, kNoSync);
  swapcontext(&fiber.context, &device.scheduler);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
  }
}

void enter(Fiber& fiber) {
  device.running = &fiber;
  threadIdx = {fiber.thread->index, 0, 0};
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&device.scheduler_fake_stack, fiber.stack, kStackBytes);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber.tsan, kNoSync);
  swapcontext(&device.scheduler, &fiber.context);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(device.scheduler_fake_stack, nullptr, nullptr);
  }
}

void fiber_main() {
  Fiber& fiber = *device.running;
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &device.scheduler_stack, &device.scheduler_stack_size);
  }
  for (;;) {
    acquire(&device.start_sync);
    device.body(device.context);
    release(&device.end_sync);
    fiber.thread->state = State::kDone;
    leave(fiber);
  }
}

Fiber* make_fiber() {
  Fiber* fiber = new Fiber;
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the stack of a thread");
  mprotect(memory, kGuardBytes, PROT_NONE);
  fiber->stack = static_cast<char*>(memory) + kGuardBytes;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
  if (__tsan_create_fiber) fiber->tsan = __tsan_create_fiber(0);
  return fiber;
}

std::vector<int64_t> permutation(int64_t size, unsigned seed) {
  std::vector<int64_t> order(size);
  for (int64_t i = 0; i < size; ++i) order[i] = i;
  if (seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

// Lets those go on whose warp operation all lanes of its mask have reached.
bool release_warps() {
  bool released = false;
  for (int first = 0; first < device.thread_count; first += kWarp) {
    Thread* warp = device.threads + first;
    const int lanes = std::min(kWarp, device.thread_count - first);
    for (int i = 0; i < lanes; ++i) {
      if (warp[i].state != State::kWarp) continue;
      const unsigned mask = warp[i].mask;
      if (!(mask >> i & 1u))
        fail("a warp operation's mask leaves out its caller: " + describe(warp[i]));
      bool complete = true;
      for (int j = 0; j < kWarp; ++j) {
        if (!(mask >> j & 1u)) continue;
        complete = complete && j < lanes && warp[j].state == State::kWarp && warp[j].mask == mask &&
                   warp[j].where.line() == warp[i].where.line();
      }
      if (!complete) continue;
      for (int j = 0; j < lanes; ++j) {
        if (!(mask >> j & 1u)) continue;
        for (int from = 0; from < lanes; ++from) warp[j].values[from] = warp[from].value;
      }
      for (int j = 0; j < lanes; ++j) {
        if (mask >> j & 1u) warp[j].state = State::kReady;
      }
      released = true;
    }
  }
  return released;
}

bool release_block() {
  const Thread* begin = device.threads;
  const Thread* end = begin + device.thread_count;
  if (std::any_of(begin, end, [](const Thread& t) { return t.state != State::kBarrier; })) {
    return false;
  }
  for (const Thread* t = begin; t != end; ++t) {
    if (t->where.line() != begin->where.line()) {
      fail("divergent barrier: " + describe(*begin) + ", " + describe(*t));
    }
  }
  for (int i = 0; i < device.thread_count; ++i) device.threads[i].state = State::kReady;
  return true;
}

[[noreturn]] void fail_to_go_on() {
  std::string message = "threads wait for ever:";
  const Thread* last = nullptr;
  int listed = 0;
  for (int i = 0; i < device.thread_count; ++i) {
    const Thread& thread = device.threads[i];
    const bool alike = last && last->state == thread.state &&
                       (thread.state == State::kDone || last->where.line() == thread.where.line());
    if (!alike && ++listed <= 8) message += (last ? ", " : " ") + describe(thread);
    last = &thread;
  }
  fail(message);
}

void free_shared() {
  if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  for (int i = 0; i < device.shared_count; ++i) std::free(device.shared[i].bytes);
  if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  device.shared_count = 0;
}

void run_block(int64_t number, const std::vector<int64_t>& order) {
  const int count = device.thread_count;
  for (int i = 0; i < count; ++i) {
    Thread& thread = device.threads[i];
    thread.index = static_cast<unsigned>(i);
    thread.state = State::kReady;
    thread.barriers = thread.warp_barriers = 0;
    // A thread's fiber differs from block to block, so that the thread of one number in two blocks
    // is two threads to ThreadSanitizer.
    Fiber* fiber = device.fibers[(i + number * 37) % count];
    fiber->thread = &thread;
  }
  for (;;) {
    bool ended = true;
    for (const int64_t i : order) {
      Thread& thread = device.threads[i];
      if (thread.state == State::kReady) enter(*device.fibers[(i + number * 37) % count]);
      ended = ended && thread.state == State::kDone;
    }
    if (ended) break;
    if (!release_warps() && !release_block()) fail_to_go_on();
  }
  free_shared();
}

}  // namespace

void set_seed(unsigned seed) { device.seed = seed; }

void run(const char* name, Grid grid, int threads, int64_t dynamic, void (*body)(void*),
         void* context) {
  device.kernel = name;
  if (grid.x == 0 || grid.y == 0) return;
  if (grid.x < 0 || grid.x > kMaxGridX || grid.y < 0 || grid.y > kMaxGridY) {
    fail("grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
         " blocks is out of range");
  }
  if (threads <= 0 || threads > kMaxThreads) {
    fail("block of " + std::to_string(threads) + " threads is out of range");
  }
  device.body = body;
  device.context = context;
  device.dynamic_size = dynamic;
  device.thread_count = threads;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), 1};
  if (__tsan_get_current_fiber) device.scheduler_tsan = __tsan_get_current_fiber();
  for (int i = 0; i < threads; ++i) {
    if (!device.fibers[i]) device.fibers[i] = make_fiber();
  }
  release(&device.start_sync);
  for (const int64_t b : permutation(grid.x * grid.y, device.seed)) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x), 0};
    run_block(b, permutation(threads, device.seed ? device.seed + static_cast<unsigned>(b) : 0));
  }
  acquire(&device.end_sync);
}

void* shared_bytes(const void* key, int64_t bytes) {
  for (int i = 0; i < device.shared_count; ++i) {
    if (device.shared[i].key == key) return device.shared[i].bytes;
  }
  if (device.shared_count == static_cast<int>(std::size(device.shared))) {
    fail("too many kinds of shared memory");
  }
  // To ThreadSanitizer the first thread that asks must not be the one that wrote all of it.
  if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  void* memory = std::malloc(bytes);
  std::memset(memory, 0xff, bytes);
  if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  device.shared[device.shared_count++] = {key, memory};
  return memory;
}

void* dynamic_bytes() { return shared_bytes(nullptr, device.dynamic_size); }

void barrier(const Where& where) {
  Fiber& fiber = *device.running;
  Thread& thread = *fiber.thread;
  char* sync = &device.block_sync[thread.barriers++ % 2];
  thread.where = where;
  thread.state = State::kBarrier;
  release(sync);
  leave(fiber);
  acquire(sync);
}

const uint64_t* exchange(unsigned mask, uint64_t value, const Where& where) {
  Fiber& fiber = *device.running;
  Thread& thread = *fiber.thread;
  thread.where = where;
  thread.mask = mask;
  thread.value = value;
  thread.state = State::kWarp;
  leave(fiber);
  return thread.values;
}

void warp_barrier(unsigned mask, const Where& where) {
  Thread& thread = *device.running->thread;
  const int turn = thread.warp_barriers++ % 2;
  release(&thread.sync[turn]);
  // Each lane hands over where it has released what it wrote.
  const uint64_t* addresses = exchange(mask, to_bits(&thread.sync[turn]), where);
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1u) acquire(from_bits<void*>(addresses[i]));
  }
}

}  // namespace neusemslice::cuda::host
