// A program without Python: loads the library and a model package, runs it on raw float32 input, writes raw output.
#include <ATen/Functions.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 6) return 2;  // library, package, input, output, sizes
  if (!dlopen(argv[1], RTLD_NOW)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  std::vector<int64_t> sizes;
  for (int i = 5; i < argc; ++i) sizes.push_back(std::atoll(argv[i]));
  const at::Tensor x = at::empty(sizes);
  std::ifstream(argv[3], std::ios::binary).read(static_cast<char*>(x.data_ptr()), x.nbytes());
  try {
    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    const at::Tensor y = model.run({x})[0].contiguous();
    std::ofstream(argv[4], std::ios::binary).write(static_cast<const char*>(y.data_ptr()), y.nbytes());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
