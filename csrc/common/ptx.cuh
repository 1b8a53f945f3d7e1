// The device side of primitives.cuh: the only file with inline PTX besides number.cuh.
#pragma once

#include <cstdint>

#include "common/number.cuh"

#define RF_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)
#define RF_CONSTANT __grid_constant__ const
#define RF_UNROLL _Pragma("unroll")
#define RF_UNROLL_TWICE _Pragma("unroll 2")
#define RF_ROLLED _Pragma("unroll 1")
#define RF_SHARED_ARRAY(T, name, count)           \
  __shared__ __align__(16) T name##_array[count]; \
  const ::rf::SharedAddress name = ::rf::shared_address(name##_array)

namespace rf {

using SharedAddress = uint32_t;

__device__ __forceinline__ int thread_x() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_x() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int block_z() { return static_cast<int>(blockIdx.z); }
__device__ __forceinline__ int grid_x() { return static_cast<int>(gridDim.x); }

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ SharedAddress dynamic_shared() {
  extern __shared__ __align__(128) unsigned char rf_dynamic_shared[];
  return shared_address(rf_dynamic_shared);
}

__device__ __forceinline__ void barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }
__device__ __forceinline__ uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
__device__ __forceinline__ float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
__device__ __forceinline__ float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

template <class V>
__device__ __forceinline__ V load_global(const void* from) {
  return *static_cast<const V*>(from);
}

template <class V>
__device__ __forceinline__ void store_global(void* to, const V& v) {
  *static_cast<V*>(to) = v;
}

template <class V>
__device__ __forceinline__ V load_shared(SharedAddress from) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  union {
    V value;
    uint16_t half;
    uint32_t word[sizeof(V) < 4 ? 1 : sizeof(V) / 4];
  } u;
  if constexpr (sizeof(V) == 2) {
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(u.half) : "r"(from) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(u.word[0]) : "r"(from) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(u.word[0]), "=r"(u.word[1]) : "r"(from) : "memory");
  } else {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(u.word[0]), "=r"(u.word[1]), "=r"(u.word[2]), "=r"(u.word[3])
                 : "r"(from)
                 : "memory");
  }
  return u.value;
}

template <class V>
__device__ __forceinline__ void store_shared(SharedAddress to, const V& v) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  union {
    V value;
    uint16_t half;
    uint32_t word[sizeof(V) < 4 ? 1 : sizeof(V) / 4];
  } u;
  u.value = v;
  if constexpr (sizeof(V) == 2) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(u.half) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(u.word[0]) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(u.word[0]), "r"(u.word[1]) : "memory");
  } else {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(u.word[0]), "r"(u.word[1]), "r"(u.word[2]),
                 "r"(u.word[3])
                 : "memory");
  }
}

template <int BYTES>
__device__ __forceinline__ void async_copy(SharedAddress to, const void* from, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  const int bytes = valid ? BYTES : 0;
  const auto source = static_cast<uint64_t>(__cvta_generic_to_global(from));
  if constexpr (BYTES == 16) {  // past L1: each byte is read once by this block
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(source), "n"(BYTES), "r"(bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <int COUNT, bool TRANSPOSED = false>
__device__ __forceinline__ void load_matrix(uint32_t (&out)[COUNT], SharedAddress row) {
  static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4);
  if constexpr (COUNT == 1 && !TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(row) : "memory");
  } else if constexpr (COUNT == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(row) : "memory");
  } else if constexpr (COUNT == 2 && !TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(row)
                 : "memory");
  } else if constexpr (COUNT == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(row)
                 : "memory");
  } else if constexpr (!TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
  }
}

#define RF_MMA(shape, type)                                            \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "             \
               "{%8, %9}, {%0, %1, %2, %3};"                           \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  RF_MMA("m16n8k16", "bf16");
}
template <>
__device__ __forceinline__ void mma<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  RF_MMA("m16n8k16", "f16");
}
template <>
__device__ __forceinline__ void mma<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  RF_MMA("m16n8k8", "tf32");
}
#undef RF_MMA

}  // namespace rf
