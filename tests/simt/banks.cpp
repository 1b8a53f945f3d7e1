#include "banks.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace simt {

void Banks::note(int thread, const char* file, int line, uint32_t address, int bytes) {
  std::vector<Place>& places = warps_[thread / 32];
  auto place = std::find_if(places.begin(), places.end(), [&](const Place& p) {
    return p.line == line && p.bytes == bytes && std::strcmp(p.file, file) == 0;
  });
  if (place == places.end()) place = places.insert(place, Place{file, line, bytes, {}, {}});
  const uint32_t pass = place->passes[thread % 32]++;
  if (pass == place->accesses.size()) place->accesses.emplace_back().fill(kIdle);
  place->accesses[pass][thread % 32] = address;
}

void Banks::settle() {
  for (const auto& [warp, places] : warps_) {
    for (const Place& place : places) {
      const int lanes = 32 / std::max(1, place.bytes / 4);
      for (const Access& access : place.accesses) {
        for (int first = 0; first < 32; first += lanes) {
          add(place.file, place.line, conflicts(&access[first], lanes, place.bytes));
        }
      }
    }
  }
  warps_.clear();
}

unsigned Banks::conflicts(const uint32_t* addresses, int lanes, int bytes) {
  std::array<std::vector<uint32_t>, 32> words;  // that each bank is asked for
  for (int lane = 0; lane < lanes; ++lane) {
    if (addresses[lane] == kIdle) continue;
    for (uint32_t word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; ++word) {
      std::vector<uint32_t>& bank = words[word % 32];
      if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);  // one word serves many lanes
    }
  }
  size_t turns = 1;
  for (const auto& bank : words) turns = std::max(turns, bank.size());
  return static_cast<unsigned>(turns - 1);
}

void Banks::add(const char* file, int line, unsigned conflicts) {
  if (conflicts == 0) return;
  const char* name = std::strrchr(file, '/');
  found_[std::string(name ? name + 1 : file) + ":" + std::to_string(line)] += conflicts;
}

uint64_t Banks::total() const {
  uint64_t sum = 0;
  for (const auto& [place, count] : found_) sum += count;
  return sum;
}

void Banks::print() const {
  std::printf("bank conflicts %llu\n", static_cast<unsigned long long>(total()));
  for (const auto& [place, count] : found_) std::printf("  %s %llu\n", place.c_str(), static_cast<unsigned long long>(count));
}

}  // namespace simt
