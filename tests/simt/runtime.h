// Runs a kernel on the CPU: blocks one after another, the threads of a block as fibers in a shuffled order.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "banks.h"
#include "shared_memory.h"

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Prints the message with the block and thread at fault and ends the process with kFaultStatus.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
constexpr int kFaultStatus = 3;

// Runs body once per thread. Any fault (race, divergent barrier, deadlock, bad address) ends the process.
void launch(Dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& body);

void set_seed(uint64_t seed);  // of the order in which threads run

// For the primitives, called from within a thread:
Dim3 block_index();
Dim3 grid_size();
int thread_index();
Instant now();
SharedMemory& shared_memory();
Banks& banks();  // of all launches of this process
CopyQueue& copy_queue();
uint32_t static_shared(const void* key, size_t bytes);
void block_barrier(const char* file, int line);
void warp_barrier(const char* file, int line);

// A step that the 32 lanes of a warp take together: each lane gives in and out, the last one to come runs compute for
// all. Lanes that meet here from different places are a fault.
using WarpCompute = void (*)(const void* const* in, void* const* out);
void warp_collective(const char* name, const char* file, int line, const void* in, void* out, WarpCompute compute);

// Of this buffer the next launch may store to every byte once: blocks that run one after another would hide that two of
// them write the same place.
void write_once(const void* buffer, size_t bytes);
void note_store(const void* to, size_t bytes);

// The sums of mma.sync, over whole tiles: d[16][8] += a[16][k] · b[k][8], no more exact than a tensor core: products are
// exact, each term keeps the bits from the largest term's first down to kTermBits, and the result is cut to float32.
constexpr int kTermBits = 24;  // the fewest that were found on a GPU
void multiply_tiles(float (&d)[16][8], const float* a, const float* b, int k);

}  // namespace simt
