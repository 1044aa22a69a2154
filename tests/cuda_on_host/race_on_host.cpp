// A race checker for barriers. Kernels are compiled with -fsanitize=thread, which calls the functions at the end of
// this file at every access; the thread sanitizer's own runtime is not linked.
//
// Two accesses of one word, at least one of them a write, are a race unless they are by the same thread, in different
// launches, or separated by a __syncthreads() of their block or a __syncwarp() of their warp. Blocks of a launch are
// never ordered. A read of shared memory that the block has not written is reported too.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "cuda_on_host.h"

namespace {

using cuda_on_host::here;

struct Access {
  uint32_t launch, block;  // launch 0: none
  uint16_t thread, barriers, warp_syncs;
  const void* pc;
};
struct Cell {  // what happened to two bytes of memory; the two readers are of different warps, if any two are
  Access write, read[2];
};
struct Page {
  static constexpr uintptr_t kCells = 2048;
  Cell cells[kCells];
};

Cell& cell(uintptr_t number) {
  static std::unordered_map<uintptr_t, Page*> pages;
  static uintptr_t last_page_number = ~uintptr_t{0};
  static Page* last_page;
  const uintptr_t page_number = number / Page::kCells;
  if (page_number != last_page_number) {
    Page*& page = pages[page_number];
    if (!page) page = static_cast<Page*>(calloc(1, sizeof(Page)));
    last_page = page;
    last_page_number = page_number;
  }
  return last_page->cells[number % Page::kCells];
}

bool ordered(const Access& before) {
  if (before.launch != here.launch) return true;
  if (before.block != here.block) return false;
  if (before.thread == here.thread || before.barriers != here.barriers) return true;
  return before.thread / 32 == here.thread / 32 && before.warp_syncs != here.warp_syncs;
}

// "file:line" of an instruction, by addr2line where there is one.
void print_access(bool write, uint32_t block, int thread, const void* pc) {
  char place[500];
  snprintf(place, sizeof(place), "pc %p", pc);
  Dl_info info;
  if (dladdr(pc, &info)) {
    const auto offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
    char command[500];
    snprintf(command, sizeof(command), "addr2line -Cse %s %#tx", info.dli_fname, offset);
    if (FILE* pipe = popen(command, "r")) {
      if (fgets(place, sizeof(place), pipe)) place[strcspn(place, "\n")] = 0;
      pclose(pipe);
    }
  }
  fprintf(stderr, "  %s by block %u thread %d: %s\n", write ? "write" : "read", block, thread, place);
}

[[noreturn]] void report(const char* what, const void* address, const void* pc, bool write, const Access* before,
                         bool before_wrote) {
  fprintf(stderr, "cuda_on_host: %s at %p\n", what, address);
  print_access(write, here.block, here.thread, pc);
  if (before) print_access(before_wrote, before->block, before->thread, before->pc);
  abort();
}

void access_cell(Cell& cell, const void* address, bool shared, bool write, const void* pc) {
  auto forget_if_old = [&](Access& access) {
    if (access.launch != here.launch || (shared && access.block != here.block)) access.launch = 0;
  };
  forget_if_old(cell.write);
  for (Access& read : cell.read) forget_if_old(read);
  if (cell.write.launch && !ordered(cell.write)) report("data race", address, pc, write, &cell.write, true);

  const Access now = {here.launch, here.block, here.thread, here.barriers, here.warp_syncs, pc};
  if (write) {
    for (const Access& read : cell.read) {
      if (read.launch && !ordered(read)) report("data race", address, pc, write, &read, false);
    }
    cell.write = now;
    for (Access& read : cell.read) read.launch = 0;
    return;
  }
  if (shared && !cell.write.launch) {
    report("read of shared memory that this block has not written", address, pc, false, nullptr, false);
  }
  if (!cell.read[0].launch || ordered(cell.read[0])) {
    cell.read[0] = now;
  } else if (cell.read[0].block != here.block || cell.read[0].thread / 32 != here.thread / 32) {
    cell.read[1] = now;
  }
}

void access(const void* address, size_t bytes, bool write, const void* pc) {
  if (!here.in_kernel || bytes == 0 || (address >= here.stacks && address < here.stacks_end)) return;
  const bool shared = cuda_on_host::is_shared(address);
  const uintptr_t first = reinterpret_cast<uintptr_t>(address), last = first + bytes - 1;
  for (uintptr_t number = first / 2; number <= last / 2; ++number) {
    access_cell(cell(number), address, shared, write, pc);
  }
}

}  // namespace

// What GCC and clang call under -fsanitize=thread.
extern "C" {
#define PC __builtin_return_address(0)
#define ACCESSES(bytes)                                                       \
  void __tsan_read##bytes(void* p) { access(p, bytes, false, PC); }           \
  void __tsan_write##bytes(void* p) { access(p, bytes, true, PC); }           \
  void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, false, PC); } \
  void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, true, PC); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, false, PC); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, true, PC); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
