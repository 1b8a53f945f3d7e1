#include "runtime.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kWarpSize = 32;

enum class State { kReady, kAtBarrier, kAtCollective, kDone };

struct Site {
  const char* name = "";
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0 && std::strcmp(name, other.name) == 0;
  }
};

struct Fiber {
  ucontext_t context;
  uint8_t* stack = nullptr;
  State state = State::kReady;
  Site site;
  CopyQueue copies;
  const void* in = nullptr;
  void* out = nullptr;
};

struct Warp {
  int arrived = 0;
  uint32_t epoch = 0;
};

struct Block {
  Dim3 index, grid;
  unsigned threads = 0;
  int current = -1;
  int at_barrier = 0, done = 0;
  uint32_t epoch = 0;
  std::vector<Warp> warps;
  SharedMemory shared;
  std::map<const void*, uint32_t> statics;
  const std::function<void()>* body = nullptr;
};

Block block;
std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
std::mt19937_64 random_order(0);
Banks counted;
const uint8_t* once = nullptr;
std::vector<bool> stored;  // which bytes behind `once` the launch has stored to

#if defined(__SANITIZE_ADDRESS__)
void start_switch(const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(nullptr, stack, bytes); }
void finish_switch(const void** stack, size_t* bytes) { __sanitizer_finish_switch_fiber(nullptr, stack, bytes); }
#else
void start_switch(const void*, size_t) {}
void finish_switch(const void**, size_t*) {}
#endif

Fiber& current() { return *fibers[block.current]; }

void leave_fiber() {
  Fiber& fiber = current();
  start_switch(scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fiber.context, &scheduler);
  finish_switch(&scheduler_stack, &scheduler_stack_bytes);
}

void enter_fiber(int thread) {
  block.current = thread;
  start_switch(fibers[thread]->stack, kStackBytes);
  swapcontext(&scheduler, &fibers[thread]->context);
  finish_switch(nullptr, nullptr);
  block.current = -1;
}

void fiber_main() {
  finish_switch(&scheduler_stack, &scheduler_stack_bytes);
  (*block.body)();
  Fiber& fiber = current();
  if (!fiber.copies.open.empty() || !fiber.copies.groups.empty()) {
    for (const auto& group : fiber.copies.groups) {
      if (!group.empty()) fail("the thread ended with async copies under way");
    }
    if (!fiber.copies.open.empty()) fail("the thread ended with async copies that were never committed");
  }
  fiber.state = State::kDone;
  ++block.done;
  leave_fiber();
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    fiber.stack = static_cast<uint8_t*>(stack);
  }
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.state = State::kReady;
  fiber.copies = {};
}

[[noreturn]] void report_stuck() {
  for (unsigned t = 0; t < block.threads; ++t) {
    const Fiber& fiber = *fibers[t];
    if (fiber.state == State::kReady || fiber.state == State::kDone) continue;
    block.current = static_cast<int>(t);
    fail("divergent %s: the thread waits at %s:%d for others that never come (%d of %u threads have ended)",
         fiber.site.name, fiber.site.file, fiber.site.line, block.done, block.threads);
  }
  fail("no thread can run");
}

void run_block() {
  for (unsigned t = 0; t < block.threads; ++t) prepare(*fibers[t]);
  std::vector<int> order(block.threads);
  for (unsigned t = 0; t < block.threads; ++t) order[t] = static_cast<int>(t);
  while (block.done < static_cast<int>(block.threads)) {
    std::shuffle(order.begin(), order.end(), random_order);
    bool ran = false;
    for (const int thread : order) {
      if (fibers[thread]->state != State::kReady) continue;
      enter_fiber(thread);
      ran = true;
    }
    if (!ran) report_stuck();
  }
}

}  // namespace

void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "SIMT fault in block (%u, %u, %u), thread %d: ", block.index.x, block.index.y, block.index.z,
               block.current);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::_Exit(kFaultStatus);
}

void set_seed(uint64_t seed) { random_order.seed(seed); }

void launch(Dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
  if (threads == 0 || threads > 1024 || threads % kWarpSize != 0) fail("a block of %u threads", threads);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  }
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  block.grid = grid;
  block.threads = threads;
  block.body = &body;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = {x, y, z};
        block.at_barrier = block.done = 0;
        block.epoch = 1;
        block.warps.assign(threads / kWarpSize, Warp{});
        block.shared.reset(shared_bytes);
        block.statics.clear();
        run_block();
        counted.settle();
      }
    }
  }
}

Dim3 block_index() { return block.index; }
Dim3 grid_size() { return block.grid; }
int thread_index() { return block.current; }
SharedMemory& shared_memory() { return block.shared; }
Banks& banks() { return counted; }
CopyQueue& copy_queue() { return current().copies; }

Instant now() { return {block.current, block.epoch, block.warps[block.current / kWarpSize].epoch}; }

uint32_t static_shared(const void* key, size_t bytes) {
  const auto found = block.statics.find(key);
  if (found != block.statics.end()) return found->second;
  return block.statics[key] = block.shared.grow(bytes);
}

void block_barrier(const char* file, int line) {
  Fiber& fiber = current();
  fiber.site = {"barrier", file, line};
  fiber.state = State::kAtBarrier;
  if (++block.at_barrier == static_cast<int>(block.threads)) {
    block.at_barrier = 0;
    ++block.epoch;
    counted.settle();
    for (unsigned t = 0; t < block.threads; ++t) {
      if (!(fibers[t]->site == fiber.site)) {
        fail("divergent barrier: this thread is at %s:%d, thread %u at %s:%d", file, line, t, fibers[t]->site.file,
             fibers[t]->site.line);
      }
      fibers[t]->state = State::kReady;
    }
  }
  leave_fiber();
}

void warp_collective(const char* name, const char* file, int line, const void* in, void* out, WarpCompute compute) {
  Fiber& fiber = current();
  const int first = block.current / kWarpSize * kWarpSize;
  Warp& warp = block.warps[first / kWarpSize];
  fiber.site = {name, file, line};
  fiber.in = in;
  fiber.out = out;
  fiber.state = State::kAtCollective;
  if (++warp.arrived < kWarpSize) {
    leave_fiber();
    return;
  }
  warp.arrived = 0;
  const void* all_in[kWarpSize];
  void* all_out[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    Fiber& other = *fibers[first + lane];
    if (!(other.site == fiber.site)) {
      fail("divergent warp: this thread is in %s at %s:%d, thread %d in %s at %s:%d", name, file, line, first + lane,
           other.site.name, other.site.file, other.site.line);
    }
    all_in[lane] = other.in;
    all_out[lane] = other.out;
    other.state = State::kReady;
  }
  compute(all_in, all_out);
}

void warp_barrier(const char* file, int line) {
  warp_collective("warp barrier", file, line, nullptr, nullptr,
                  [](const void* const*, void* const*) { ++block.warps[block.current / kWarpSize].epoch; });
}

void write_once(const void* buffer, size_t bytes) {
  once = static_cast<const uint8_t*>(buffer);
  stored.assign(bytes, false);
}

void note_store(const void* to, size_t bytes) {
  const auto* first = static_cast<const uint8_t*>(to);
  if (first < once || first >= once + stored.size()) return;
  for (auto at = static_cast<size_t>(first - once), end = std::min(at + bytes, stored.size()); at < end; ++at) {
    if (stored[at]) fail("byte %zu of the output is stored to a second time", at);
    stored[at] = true;
  }
}

void multiply_tiles(float (&d)[16][8], const float* a, const float* b, int k) {
  std::vector<double> terms(k + 1);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      terms[k] = d[row][column];
      for (int i = 0; i < k; ++i) terms[i] = static_cast<double>(a[row * k + i]) * b[i * 8 + column];
      double largest = 0, sum = 0;
      bool finite = true;
      for (const double term : terms) {
        largest = std::max(largest, std::abs(term));
        sum += term;
        finite &= std::isfinite(term);
      }
      if (finite && largest > 0) {
        const double step = std::ldexp(1.0, std::ilogb(largest) - (kTermBits - 1));
        sum = 0;
        for (const double term : terms) sum += std::trunc(term / step) * step;
      }
      float result = static_cast<float>(sum);
      if (finite && std::abs(static_cast<double>(result)) > std::abs(sum)) result = std::nextafter(result, 0.0f);
      d[row][column] = result;
    }
  }
}

}  // namespace simt
