/* A libcuda.so.1 for machines without a GPU: it takes launches and tensor maps as the driver does, and writes them down.
   Triton's own launcher, and whatever else speaks the driver's interface, then runs up to the driver itself. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { kMostParameters = 64 };

struct CUfunc_st {
  char name[256];
  int count;
  size_t sizes[kMostParameters];
};

static long long launch_count;
static unsigned char* log_data;
static size_t log_size, log_room;
static int log_on;

static void put(const void* data, size_t size) {
  if (log_size + size > log_room) {
    log_room = 2 * (log_size + size);
    log_data = realloc(log_data, log_room);
  }
  memcpy(log_data + log_size, data, size);
  log_size += size;
}

/* What the tests ask of it. */
long long stand_in_launches(void) { return launch_count; }
void stand_in_log(int on) { log_on = on, log_size = 0; }
size_t stand_in_log_size(void) { return log_size; }
const void* stand_in_log_data(void) { return log_data; }
void stand_in_parameters(CUfunction function, int count, const size_t* sizes) {
  function->count = count;
  memcpy(function->sizes, sizes, count * sizeof(size_t));
}

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return *value = 232448, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return *value = 233472, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return *value = 9, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return *value = 132, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return *value = 32, CUDA_SUCCESS;
    default:
      return *value = 0, CUDA_SUCCESS;
  }
}
static int context;
CUresult cuCtxGetCurrent(CUcontext* current) { return *current = (CUcontext)&context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* retained, CUdevice device) {
  return *retained = (CUcontext)&context, CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) { return *text = "an error", CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* module, const void* image) { return *module = malloc(1), CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return free(module), CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = calloc(1, sizeof(struct CUfunc_st));
  snprintf((*function)->name, sizeof (*function)->name, "%s", name);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
  return *count = 1, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr*)value = pointer, CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

/* A map says what it was made of: the address, then a hash of all else. */
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  uint64_t hash = 1469598103934665603u;
#define MIX(value) hash = (hash ^ (uint64_t)(value)) * 1099511628211u
  MIX(type), MIX(rank), MIX(interleave), MIX(swizzle), MIX(promotion), MIX(fill);
  for (cuuint32_t i = 0; i < rank; ++i) {
    MIX(sizes[i]), MIX(box[i]), MIX(steps[i]);
    if (i + 1 < rank) MIX(strides[i]);
  }
  memset(map, 0, sizeof *map);
  map->opaque[0] = (uint64_t)address;
  map->opaque[1] = hash;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  ++launch_count;
  if (log_on) {
    const int64_t head[] = {config->gridDimX,  config->gridDimY,           config->gridDimZ,       config->blockDimX,
                            config->numAttrs,  config->sharedMemBytes,     (int64_t)config->hStream, (int64_t)function,
                            function->count};
    put(function->name, sizeof function->name);
    put(head, sizeof head);
    for (int i = 0; i < function->count; ++i) put(parameters[i], function->sizes[i]);
  }
  return CUDA_SUCCESS;
}
