#include "shared_memory.h"

#include <cstring>

#include "runtime.h"

namespace simt {

namespace {
constexpr uint8_t kPoison = 0xff;  // NaN as bf16, fp16 and float
}

void SharedMemory::reset(size_t bytes) {
  bytes_.assign(bytes, kPoison);
  cells_.assign((bytes + 1) / 2, Cell{});
}

uint32_t SharedMemory::grow(size_t bytes) {
  const size_t start = (bytes_.size() + 127) / 128 * 128;
  bytes_.resize(start + bytes, kPoison);
  cells_.resize((start + bytes + 1) / 2);
  return static_cast<uint32_t>(start);
}

SharedMemory::Cell* SharedMemory::cells(uint32_t address, int bytes, const char* what) {
  if (address % bytes != 0) fail("misaligned %s of %d bytes at shared address %u", what, bytes, address);
  if (static_cast<size_t>(address) + bytes > bytes_.size()) {
    fail("%s of %d bytes at shared address %u, outside the block's %zu bytes", what, bytes, address, bytes_.size());
  }
  return &cells_[address / 2];
}

bool SharedMemory::unordered(const Instant& before, const Instant& now) {
  if (before.thread < 0 || before.thread == now.thread || before.block_epoch != now.block_epoch) return false;
  const bool same_warp = before.thread / 32 == now.thread / 32;
  return !(same_warp && before.warp_epoch != now.warp_epoch);
}

void SharedMemory::read(uint32_t from, void* to, int bytes, const Instant& now) {
  Cell* cell = cells(from, bytes, "read");
  for (int i = 0; i < bytes / 2; ++i) {
    if (cell[i].in_flight)
      fail("thread %d reads shared address %u while an async copy to it is under way", now.thread, from + 2 * i);
    if (!cell[i].written) fail("thread %d reads shared address %u, which nobody wrote", now.thread, from + 2 * i);
    if (unordered(cell[i].writer, now)) {
      fail("race at shared address %u: thread %d reads what thread %d wrote, with no barrier between", from + 2 * i,
           now.thread, cell[i].writer.thread);
    }
    // Readers since the last barrier are remembered as one, or as "several", which any writer then collides with.
    if (cell[i].reader.block_epoch != now.block_epoch || cell[i].reader.thread < 0) {
      cell[i].several_readers = false;
    } else if (unordered(cell[i].reader, now)) {
      cell[i].several_readers = true;
    }
    cell[i].reader = now;
  }
  std::memcpy(to, &bytes_[from], bytes);
}

void SharedMemory::mark_written(Cell& cell, uint32_t address, const Instant& now) {
  if (cell.in_flight)
    fail("thread %d writes shared address %u while an async copy to it is under way", now.thread, address);
  if (unordered(cell.writer, now)) {
    fail("race at shared address %u: threads %d and %d both write, with no barrier between", address,
         cell.writer.thread, now.thread);
  }
  if (unordered(cell.reader, now) || (cell.several_readers && cell.reader.block_epoch == now.block_epoch &&
                                      cell.reader.warp_epoch == now.warp_epoch)) {
    fail("race at shared address %u: thread %d writes what thread %d reads, with no barrier between", address,
         now.thread, cell.reader.thread);
  }
  cell.writer = now;
  cell.written = true;
}

void SharedMemory::write(uint32_t to, const void* from, int bytes, const Instant& now) {
  Cell* cell = cells(to, bytes, "write");
  for (int i = 0; i < bytes / 2; ++i) mark_written(cell[i], to + 2 * i, now);
  std::memcpy(&bytes_[to], from, bytes);
}

void SharedMemory::begin_copy(uint32_t to, const void* from, int bytes, bool valid, const Instant& now,
                              CopyQueue& queue) {
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0) fail("async copy of %d bytes from a misaligned address", bytes);
  Cell* cell = cells(to, bytes, "async copy");
  Copy copy{to, bytes, {}};
  if (valid) std::memcpy(copy.data, from, bytes);
  for (int i = 0; i < bytes / 2; ++i) {
    mark_written(cell[i], to + 2 * i, now);
    cell[i].in_flight = true;
  }
  std::memset(&bytes_[to], kPoison, bytes);
  queue.open.push_back(copy);
}

void SharedMemory::commit(CopyQueue& queue) {
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
}

void SharedMemory::wait(size_t allowed, const Instant& now, CopyQueue& queue) {
  while (queue.groups.size() > allowed) {
    for (const Copy& copy : queue.groups.front()) {
      std::memcpy(&bytes_[copy.to], copy.data, copy.bytes);
      Cell* cell = &cells_[copy.to / 2];
      for (int i = 0; i < copy.bytes / 2; ++i) {
        cell[i].in_flight = false;
        cell[i].writer = now;
      }
    }
    queue.groups.pop_front();
  }
}

}  // namespace simt
