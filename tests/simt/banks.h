// Counts bank conflicts: what an access to shared memory waits because its lanes ask one bank for several words.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace simt {

// Shared memory has 32 banks of four bytes. A warp's access is served in steps of up to 128 bytes: all lanes at once with
// four bytes or less each, 16 lanes with 8, eight with 16; ldmatrix takes eight rows of 16 bytes. In a step every bank
// gives one word; each further word costs one more turn, a conflict. Asynchronous copies are not counted: they land as
// memory answers.
class Banks {
 public:
  // A load or a store of one thread. Threads run one after another here, so that the lanes of an access have to be found
  // again: an access of a warp is what its lanes do when each comes to this place for the n-th time since a barrier.
  void note(int thread, const char* file, int line, uint32_t address, int bytes);
  // Counts what was noted, at a barrier of the block and at its end.
  void settle();
  // The conflicts of one step; a lane that takes no part is kIdle.
  static constexpr uint32_t kIdle = 0xffffffffu;
  static unsigned conflicts(const uint32_t* addresses, int lanes, int bytes);
  void add(const char* file, int line, unsigned conflicts);

  uint64_t total() const;
  void print() const;  // the total, and a line for every place that has any

 private:
  using Access = std::array<uint32_t, 32>;  // the lanes' addresses
  struct Place {
    const char* file;
    int line, bytes;
    std::array<uint32_t, 32> passes{};
    std::vector<Access> accesses;
  };

  std::map<int, std::vector<Place>> warps_;
  std::map<std::string, uint64_t> found_;
};

}  // namespace simt
