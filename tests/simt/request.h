// What a test asks of the runner: a folder with request.txt ("key value" lines) and one raw file for each tensor.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace simt {

class Request {
 public:
  explicit Request(std::string folder);
  ~Request();
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;

  int64_t integer(const std::string& key, int64_t fallback = 0) const;
  double real(const std::string& key) const;
  std::string text(const std::string& key) const;
  std::vector<int64_t> integers(const std::string& key) const;

  // The tensor's file in a block of exactly its size behind `<name>_shift` bytes, so that the sanitizer sees every
  // access past its end; null without a file.
  void* buffer(const std::string& name);
  // A block of NaN.
  void* output(const std::string& name, size_t bytes);
  void save(const std::string& name) const;

 private:
  struct Block {
    uint8_t* memory;
    size_t shift, bytes;
  };

  std::string folder_;
  std::map<std::string, std::string> values_;
  std::map<std::string, Block> blocks_;
};

}  // namespace simt
