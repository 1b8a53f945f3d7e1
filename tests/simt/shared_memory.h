// Shared memory of one block, with a shadow that knows who touched what since which barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

namespace simt {

// A thread's place in the block's order of events: two events of different threads are ordered only by a barrier
// between them, or, within a warp, by a warp barrier.
struct Instant {
  int thread = -1;
  uint32_t block_epoch = 0;
  uint32_t warp_epoch = 0;
};

struct Copy {
  uint32_t to;
  int bytes;
  uint8_t data[16];
};

// Copies of one thread: those not yet committed, and the committed groups, oldest first.
struct CopyQueue {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

class SharedMemory {
 public:
  void reset(size_t bytes);
  uint32_t grow(size_t bytes);  // static arrays go behind the dynamic part; gives the address
  void read(uint32_t from, void* to, int bytes, const Instant& now);
  void write(uint32_t to, const void* from, int bytes, const Instant& now);
  void begin_copy(uint32_t to, const void* from, int bytes, bool valid, const Instant& now, CopyQueue& queue);
  static void commit(CopyQueue& queue);
  void wait(size_t allowed, const Instant& now, CopyQueue& queue);

 private:
  // One cell for every two bytes: no element is smaller.
  struct Cell {
    Instant writer;
    Instant reader;
    bool several_readers = false;
    bool written = false;
    bool in_flight = false;
  };

  Cell* cells(uint32_t address, int bytes, const char* what);
  static bool unordered(const Instant& before, const Instant& now);
  void mark_written(Cell& cell, uint32_t address, const Instant& now);

  std::vector<uint8_t> bytes_;
  std::vector<Cell> cells_;
};

}  // namespace simt
