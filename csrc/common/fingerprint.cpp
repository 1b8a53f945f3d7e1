// Fingerprints of memory: how the package notices that somebody wrote to a tensor from which weights were packed.
//
// A fingerprint is one 32-bit hash for each 64 bytes, a sixteenth of the memory it stands for. At each call only a few
// lines of every tensor are hashed again, at places that move from call to call. resnet_fused/ops/fingerprint.py calls
// these functions and has the same hash in Python.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kLine = 64;       // bytes
constexpr int64_t kLargeFrom = 256;  // lines
constexpr int64_t kFew = 4, kMany = 8;

// Odd multipliers, so that a change of one word alone always changes the sum.
constexpr uint64_t kMultipliers[kLine / 8] = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb,
                                              0xd6e8feb86659fd93, 0xa0761d6478bd642f, 0xe7037ed1a0b428db,
                                              0x8ebc6af09c88c6e3, 0x589965cc75374cc3};

uint32_t hash(const unsigned char* line) {
  uint64_t words[kLine / 8], sum = 0;
  std::memcpy(words, line, kLine);
  for (int i = 0; i < kLine / 8; ++i) sum += words[i] * kMultipliers[i];
  return static_cast<uint32_t>(sum ^ (sum >> 32));
}

// The last line may be short; what is missing counts as zeros.
uint32_t hash_of(const unsigned char* data, int64_t bytes, int64_t line) {
  const int64_t at = line * kLine, size = std::min(kLine, bytes - at);
  if (size == kLine) return hash(data + at);
  unsigned char padded[kLine] = {};
  std::memcpy(padded, data + at, size);
  return hash(padded);
}

// A tensor's memory, and the hashes of its lines as they were.
struct Row {
  const unsigned char* data;
  int64_t bytes;
  const uint32_t* hashes;
};
static_assert(sizeof(Row) == 3 * sizeof(int64_t));

// Whether holds(line) is true of all lines that are sampled in this turn; they are spread evenly.
template <class Holds>
bool every_sample(const Row& row, int64_t turn, Holds&& holds) {
  const int64_t lines = (row.bytes + kLine - 1) / kLine;
  const int64_t samples = std::min(lines, lines < kLargeFrom ? kFew : kMany);
  for (int64_t sample = 0; sample < samples; ++sample) {
    if (!holds((sample * lines / samples + turn) % lines)) return false;
  }
  return true;
}

}  // namespace

extern "C" {

// Hashes all lines of `data` into `hashes`.
__attribute__((visibility("default"))) void resnet_fused_fingerprint(const unsigned char* data, int64_t bytes,
                                                                     uint32_t* hashes) {
  for (int64_t line = 0; line * kLine < bytes; ++line) hashes[line] = hash_of(data, bytes, line);
}

// The first of `count` rows in which a sampled line is not what it was, or -1. `turn`, one more at each call, moves the
// sampled lines by one.
__attribute__((visibility("default"))) int64_t resnet_fused_first_changed(const Row* rows, int64_t count,
                                                                          int64_t turn) {
  for (int64_t i = 0; i < count; ++i) {
    const auto same = [&](int64_t line) { return hash_of(rows[i].data, rows[i].bytes, line) == rows[i].hashes[line]; };
    if (!every_sample(rows[i], turn, same)) return i;
  }
  return -1;
}

// One number for the sampled lines of all rows, which need no hashes.
__attribute__((visibility("default"))) int64_t resnet_fused_glance(const Row* rows, int64_t count, int64_t turn) {
  uint64_t seen = 0;
  for (int64_t i = 0; i < count; ++i) {
    every_sample(rows[i], turn, [&](int64_t line) {
      seen = (seen ^ hash_of(rows[i].data, rows[i].bytes, line)) * kMultipliers[0];
      return true;
    });
  }
  return static_cast<int64_t>(seen);
}
}
