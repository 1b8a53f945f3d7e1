#include "request.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>

#include "runtime.h"

namespace simt {

Request::Request(std::string folder) : folder_(std::move(folder)) {
  std::ifstream file(folder_ + "/request.txt");
  if (!file) fail("no request in %s", folder_.c_str());
  std::string key, rest;
  while (file >> key && std::getline(file >> std::ws, rest)) values_[key] = rest;
}

Request::~Request() {
  for (const auto& [name, block] : blocks_) std::free(block.memory);
}

std::string Request::text(const std::string& key) const {
  const auto found = values_.find(key);
  return found == values_.end() ? "" : found->second;
}

int64_t Request::integer(const std::string& key, int64_t fallback) const {
  const std::string value = text(key);
  return value.empty() ? fallback : std::stoll(value);
}

double Request::real(const std::string& key) const { return std::stod(text(key)); }

std::vector<int64_t> Request::integers(const std::string& key) const {
  std::istringstream stream(text(key));
  return {std::istream_iterator<int64_t>(stream), {}};
}

void* Request::output(const std::string& name, size_t bytes) {
  const auto shift = static_cast<size_t>(integer(name + "_shift"));
  auto* memory = static_cast<uint8_t*>(std::malloc(shift + bytes));
  std::memset(memory, 0xff, shift + bytes);
  blocks_[name] = {memory, shift, bytes};
  return memory + shift;
}

void* Request::buffer(const std::string& name) {
  std::ifstream file(folder_ + "/" + name + ".bin", std::ios::binary);
  if (!file) return nullptr;
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  void* memory = output(name, bytes.size());
  std::memcpy(memory, bytes.data(), bytes.size());
  return memory;
}

void Request::save(const std::string& name) const {
  const Block& block = blocks_.at(name);
  std::ofstream file(folder_ + "/" + name + ".bin", std::ios::binary);
  file.write(reinterpret_cast<const char*>(block.memory + block.shift), static_cast<std::streamsize>(block.bytes));
  if (!file) fail("cannot write %s", name.c_str());
}

}  // namespace simt
