// Runtime of cuda_on_host.h: fibers, barriers, warp operations, shared memory. Never compiled with -fsanitize=thread,
// which would report the scheduler's own state as races.
#include "cuda_on_host.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>

// Present only where the address sanitizer is linked.
#define WEAK extern "C" __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
WEAK void __asan_unpoison_memory_region(const volatile void*, size_t);

// Saves the callee-saved registers and the stack pointer, loads the others'. (ucontext does the same with two system
// calls a switch and is 15 times slower.)
extern "C" void switch_stack(void** save, void* load);
#if defined(__x86_64__)
constexpr int kSavedRegisters = 6;
asm(R"(
.text
.globl switch_stack
switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#else
#error "cuda_on_host switches stacks on x86-64 only"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_host {

Here here;

namespace {

constexpr size_t kStackBytes = 64 << 10, kGuardBytes = 4096;
constexpr int kMaxThreads = 1024;

struct Fiber {
  enum State { ready, at_barrier, at_warp, done } state;
  void* stack_pointer;  // saved
  char* stack;
  uint3 index;
  int line;  // where it waits
  uint16_t barriers, warp_syncs;
  // Of the warp operation it waits in:
  unsigned mask;
  void* mine;
  Complete complete;
  void* fake_stack;  // the address sanitizer's
};
struct Shared {
  const void* key;
  char* memory;
  size_t bytes;
};

Fiber fibers[kMaxThreads];
int current, num_threads, num_live, num_waiting;  // threads of this block: running, all, not exited, at the barrier
const std::function<void()>* body;
std::vector<Shared> shared_variables;

void* scheduler_stack_pointer;
void* scheduler_fake_stack;
const void* scheduler_bottom;
size_t scheduler_size;

void enter(int i) {
  Fiber& fiber = fibers[i];
  current = i;
  threadIdx = fiber.index;
  here.thread = static_cast<uint16_t>(i);
  here.barriers = fiber.barriers;
  here.warp_syncs = fiber.warp_syncs;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
  }
  here.in_kernel = true;
  switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
  here.in_kernel = false;
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void leave(bool for_good) {
  Fiber& fiber = fibers[current];
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, scheduler_bottom, scheduler_size);
  }
  switch_stack(&fiber.stack_pointer, scheduler_stack_pointer);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_bottom, &scheduler_size);
  }
}

void release_barrier_if_complete() {
  if (num_waiting == 0 || num_waiting < num_live) return;
  int line = -1;
  for (int i = 0; i < num_threads; ++i) {
    if (fibers[i].state != Fiber::at_barrier) continue;
    if (line >= 0 && fibers[i].line != line) {
      fail("divergent __syncthreads(): some threads at line %d, some at line %d", line, fibers[i].line);
    }
    line = fibers[i].line;
  }
  if (num_live < num_threads) {
    fail("__syncthreads() at line %d reached by %d of %d threads, the others have exited", line, num_live, num_threads);
  }
  for (int i = 0; i < num_threads; ++i) fibers[i].state = Fiber::ready;
  num_waiting = 0;
}

void start() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
  (*body)();
  fibers[current].state = Fiber::done;
  --num_live;
  release_barrier_if_complete();
  leave(true);
}

void prepare(Fiber& fiber, int i, dim3 block) {
  fiber = Fiber();
  fiber.stack = here.stacks + i * kStackBytes;
  if (__asan_unpoison_memory_region) {
    __asan_unpoison_memory_region(fiber.stack + kGuardBytes, kStackBytes - kGuardBytes);
  }
  fiber.index = {unsigned(i) % block.x, unsigned(i) / block.x % block.y, unsigned(i) / (block.x * block.y)};
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 2;  // 16-byte aligned
  *--top = nullptr;                                                      // start() returns to nowhere
  *--top = reinterpret_cast<void*>(start);
  fiber.stack_pointer = top - kSavedRegisters;
}

[[noreturn]] void report_deadlock() {
  for (int i = 0; i < num_threads; ++i) {
    if (fibers[i].state == Fiber::done) continue;
    const char* what = fibers[i].state == Fiber::at_barrier ? "the block" : "its warp";
    fprintf(stderr, "  thread %d waits at line %d for %s\n", i, fibers[i].line, what);
  }
  fail("deadlock: no thread can run");
}

void run_block(dim3 block, size_t shared_bytes) {
  num_threads = num_live = static_cast<int>(block.x * block.y * block.z);
  num_waiting = 0;
  here.block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (shared_bytes > 0) shared(nullptr, shared_bytes);
  for (int i = 0; i < num_threads; ++i) prepare(fibers[i], i, block);
  while (num_live > 0) {
    bool moved = false;
    for (int i = 0; i < num_threads; ++i) {
      if (fibers[i].state != Fiber::ready) continue;
      enter(i);
      moved = true;
    }
    if (!moved && num_live > 0) report_deadlock();
  }
  for (Shared& variable : shared_variables) free(variable.memory);
  shared_variables.clear();
}

void map_stacks() {
  constexpr size_t kBytes = kMaxThreads * kStackBytes;
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the stacks");
  here.stacks = static_cast<char*>(memory);
  here.stacks_end = here.stacks + kBytes;
  for (int i = 0; i < kMaxThreads; ++i) mprotect(here.stacks + i * kStackBytes, kGuardBytes, PROT_NONE);
}

}  // namespace

void fail(const char* format, ...) {
  fprintf(stderr, "cuda_on_host: block %u thread %d: ", here.block, here.thread);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  abort();
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool empty = threads == 0 || grid.x == 0 || grid.y == 0 || grid.z == 0;
  const bool too_large = threads > kMaxThreads || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535;
  if (empty || too_large || shared_bytes > 48 << 10) return cudaErrorInvalidConfiguration;
  if (!here.stacks) map_stacks();
  body = &thread;
  ++here.launch;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(block, shared_bytes);
    }
  }
  return cudaSuccess;
}

void* shared(const void* key, size_t bytes) {
  for (const Shared& variable : shared_variables) {
    if (variable.key == key) return variable.memory;
  }
  if (bytes == 0) fail("the launch asks for no dynamic shared memory");
  void* memory;
  if (posix_memalign(&memory, 16, bytes)) fail("no memory for shared memory");
  memset(memory, 0xff, bytes);
  shared_variables.push_back({key, static_cast<char*>(memory), bytes});
  return memory;
}

bool is_shared(const void* address) {
  for (const Shared& variable : shared_variables) {
    if (address >= variable.memory && address < variable.memory + variable.bytes) return true;
  }
  return false;
}

int lane() { return current % 32; }

void barrier(int line) {
  Fiber& fiber = fibers[current];
  fiber.state = Fiber::at_barrier;
  fiber.line = line;
  ++fiber.barriers;
  ++num_waiting;
  release_barrier_if_complete();
  if (fiber.state != Fiber::ready) leave(false);  // the last to arrive goes on
  here.barriers = fiber.barriers;
}

void warp_collective(unsigned mask, void* mine, Complete complete, int line) {
  const int me = current % 32, base = current - me;
  Fiber& fiber = fibers[current];
  if (!(mask >> me & 1)) fail("line %d: the calling lane is not in its mask %08x", line, mask);
  fiber.state = Fiber::at_warp;
  fiber.line = line;
  fiber.mask = mask;
  fiber.mine = mine;
  fiber.complete = complete;
  void* lanes[32];
  bool all = true;  // the last lane to arrive looks at all of them
  for (int l = 0; l < 32 && all; ++l) {
    if (!(mask >> l & 1)) continue;
    const Fiber& other = fibers[base + l];
    if (base + l >= num_threads || other.state == Fiber::done) {
      fail("line %d: lane %d of the mask %08x has exited", line, l, mask);
    }
    all = other.state == Fiber::at_warp;
    if (all && (other.mask != mask || other.line != line || other.complete != complete)) {
      fail("lane %d is at the warp operation of line %d with mask %08x, lane %d at line %d with mask %08x", me, line,
           mask, l, other.line, other.mask);
    }
    lanes[l] = other.mine;
  }
  if (all) {
    if (complete) complete(lanes, mask);
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) fibers[base + l].state = Fiber::ready;
    }
  } else {
    leave(false);
  }
  if (!complete) here.warp_syncs = ++fiber.warp_syncs;
}

// ---- tensor cores ----
//
// PTX ISA, "Matrix fragments": lane 4 g + t holds the elements of row (of b: column) g and of column (row) t, t + 4, or
// 2 t, 2 t + 1, 2 t + 8, 2 t + 9. Factors of TF32 lose their low 13 bits; a sum is exact, then rounded toward zero
// once.

#define UNCHECKED __attribute__((no_sanitize("address", "undefined"), optimize("O3")))

namespace {

float toward_zero(double exact) {
  const float x = static_cast<float>(exact);
  return std::abs(static_cast<double>(x)) > std::abs(exact) ? std::nextafter(x, 0.0f) : x;
}

// The elements of a register: one of TF32 or two of 16 bits.
template <Factors type>
UNCHECKED void unpack(uint32_t bits, double* to) {
  if constexpr (type == Factors::tf32) {
    *to = __uint_as_float(bits & 0xffffe000u);
  } else {
    for (int i = 0; i < 2; ++i) {
      const uint16_t half = static_cast<uint16_t>(bits >> 16 * i);
      to[i] = type == Factors::bf16 ? __bfloat162float(__nv_bfloat16_raw{half}) : __half2float(__half_raw{half});
    }
  }
}

struct Mma {
  float* sums;
  const uint32_t *a, *b;
};

template <Factors type>
UNCHECKED void multiply(void* const lanes[32], unsigned) {
  constexpr int kDepth = type == Factors::tf32 ? 8 : 16, kPack = kDepth / 8;
  double a[16][kDepth], b[8][kDepth];
  for (int l = 0; l < 32; ++l) {
    const auto& lane = *static_cast<const Mma*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) unpack<type>(lane.a[i], &a[g + 8 * (i % 2)][kPack * (t + 4 * (i / 2))]);
    for (int i = 0; i < 2; ++i) unpack<type>(lane.b[i], &b[g][kPack * (t + 4 * i)]);
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      float& sum = static_cast<const Mma*>(lanes[l])->sums[i];
      double exact = sum;
      for (int k = 0; k < kDepth; ++k) exact += a[l / 4 + 8 * (i / 2)][k] * b[2 * (l % 4) + i % 2][k];
      sum = toward_zero(exact);
    }
  }
}

struct MmaF64 {
  double *sum0, *sum1, a, b;
};

void multiply_f64(void* const lanes[32], unsigned) {
  for (int l = 0; l < 32; ++l) {
    auto& lane = *static_cast<MmaF64*>(lanes[l]);
    for (int i = 0; i < 2; ++i) {
      double& sum = *(i == 0 ? lane.sum0 : lane.sum1);
      for (int k = 0; k < 4; ++k) {
        const auto& left = *static_cast<MmaF64*>(lanes[l / 4 * 4 + k]);
        const auto& right = *static_cast<MmaF64*>(lanes[(2 * (l % 4) + i) * 4 + k]);
        sum = std::fma(left.a, right.b, sum);
      }
    }
  }
}

}  // namespace

void mma(Factors type, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  Mma mine = {sums, a, b};
  warp_collective(~0u, &mine,
                  type == Factors::tf32   ? multiply<Factors::tf32>
                  : type == Factors::bf16 ? multiply<Factors::bf16>
                                          : multiply<Factors::f16>,
                  line);
}

void mma(double& sum0, double& sum1, double a, double b, int line) {
  MmaF64 mine = {&sum0, &sum1, a, b};
  warp_collective(~0u, &mine, multiply_f64, line);
}

}  // namespace cuda_on_host
