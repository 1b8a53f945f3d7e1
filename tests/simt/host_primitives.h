// The host side of csrc/common/primitives.cuh, over the runtime's fibers and checked shared memory.
#pragma once

#include <cstring>

#include "common/number.cuh"
#include "runtime.h"

#define RF_KERNEL(threads, min_blocks) void
#define RF_CONSTANT const
#define RF_UNROLL
#define RF_UNROLL_TWICE
#define RF_ROLLED
#define RF_SHARED_ARRAY(T, name, count)   \
  static const char name##_array_key = 0; \
  const ::rf::SharedAddress name = ::simt::static_shared(&name##_array_key, sizeof(T) * (count))

namespace rf {

using SharedAddress = uint32_t;

inline int thread_x() { return simt::thread_index(); }
inline int block_x() { return static_cast<int>(simt::block_index().x); }
inline int block_z() { return static_cast<int>(simt::block_index().z); }
inline int grid_x() { return static_cast<int>(simt::grid_size().x); }
inline SharedAddress dynamic_shared() { return 0; }

inline void barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::block_barrier(file, line);
}

inline void warp_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::warp_barrier(file, line);
}

struct ShuffleIn {
  float value;
  int lane;
};

inline float shuffle(float v, int lane, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const ShuffleIn in{v, lane & 31};
  float out;
  simt::warp_collective("shuffle", file, line, &in, &out, [](const void* const* in, void* const* out) {
    for (int i = 0; i < 32; ++i) {
      const int from = static_cast<const ShuffleIn*>(in[i])->lane;
      *static_cast<float*>(out[i]) = static_cast<const ShuffleIn*>(in[from])->value;
    }
  });
  return out;
}

inline float shuffle_xor(float v, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return shuffle(v, (simt::thread_index() & 31) ^ mask, file, line);
}

inline uint32_t ballot(bool predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  uint32_t out;
  simt::warp_collective("ballot", file, line, &predicate, &out, [](const void* const* in, void* const* out) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(*static_cast<const bool*>(in[i])) << i;
    for (int i = 0; i < 32; ++i) *static_cast<uint32_t*>(out[i]) = bits;
  });
  return out;
}

inline void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) simt::fail("misaligned global access of %zu bytes", bytes);
}

template <class V>
V load_global(const void* from) {
  check_aligned(from, sizeof(V));
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V>
void store_global(void* to, const V& v) {
  check_aligned(to, sizeof(V));
  simt::note_store(to, sizeof(V));
  std::memcpy(to, &v, sizeof(V));
}

template <class V>
V load_shared(SharedAddress from, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  V v;
  simt::banks().note(simt::thread_index(), file, line, from, sizeof(V));
  simt::shared_memory().read(from, &v, sizeof(V), simt::now());
  return v;
}

template <class V>
void store_shared(SharedAddress to, const V& v, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::banks().note(simt::thread_index(), file, line, to, sizeof(V));
  simt::shared_memory().write(to, &v, sizeof(V), simt::now());
}

template <int BYTES>
void async_copy(SharedAddress to, const void* from, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  simt::shared_memory().begin_copy(to, from, BYTES, valid, simt::now(), simt::copy_queue());
}

inline void async_commit() { simt::SharedMemory::commit(simt::copy_queue()); }

template <int N>
void async_wait() {
  simt::shared_memory().wait(N, simt::now(), simt::copy_queue());
}

struct MatrixIn {
  SharedAddress row;
  const char* file;
  int line;
};

template <int COUNT, bool TRANSPOSED = false>
void load_matrix(uint32_t (&out)[COUNT], SharedAddress row, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  const MatrixIn in{row, file, line};
  simt::warp_collective("load_matrix", file, line, &in, out, [](const void* const* in, void* const* out) {
    const auto* place = static_cast<const MatrixIn*>(in[0]);
    for (int matrix = 0; matrix < COUNT; ++matrix) {
      SharedAddress rows[8];
      for (int r = 0; r < 8; ++r) rows[r] = static_cast<const MatrixIn*>(in[matrix * 8 + r])->row;
      simt::banks().add(place->file, place->line, simt::Banks::conflicts(rows, 8, 16));
      uint16_t tile[8][8];
      for (int r = 0; r < 8; ++r) {
        simt::Instant now = simt::now();
        now.thread = now.thread / 32 * 32 + matrix * 8 + r;  // the lane that gave the row's address
        simt::shared_memory().read(rows[r], tile[r], 16, now);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4, c = lane % 4 * 2;
        const uint32_t low = TRANSPOSED ? tile[c][r] : tile[r][c];
        const uint32_t high = TRANSPOSED ? tile[c + 1][r] : tile[r][c + 1];
        static_cast<uint32_t*>(out[lane])[matrix] = low | high << 16;
      }
    }
  });
}

struct MmaIn {
  const uint32_t* a;
  const uint32_t* b;
};

inline float half_of(uint32_t word, int part, bf16) { return to_float(bf16{static_cast<uint16_t>(word >> 16 * part)}); }
inline float half_of(uint32_t word, int part, fp16) { return to_float(fp16{static_cast<uint16_t>(word >> 16 * part)}); }
inline float half_of(uint32_t word, int, float) { return float_of(word & 0xffffe000u); }  // the unit drops the rest

// Fragment layouts as the PTX manual gives them: lane = 4·group + t; a register holds two columns (one for TF32).
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file = __builtin_FILE(),
         int line = __builtin_LINE()) {
  const MmaIn in{a, b};
  simt::warp_collective("mma", file, line, &in, d, [](const void* const* in, void* const* out) {
    constexpr int kPack = sizeof(T) == 2 ? 2 : 1;
    constexpr int kDepth = 8 * kPack;
    float tile_a[16][kDepth], tile_b[kDepth][8], tile_d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, t = lane % 4;
      const auto* fragment = static_cast<const MmaIn*>(in[lane]);
      const auto* sum = static_cast<const float*>(out[lane]);
      for (int part = 0; part < kPack; ++part) {
        for (int i = 0; i < 4; ++i) {
          tile_a[group + i % 2 * 8][t * kPack + part + i / 2 * 4 * kPack] = half_of(fragment->a[i], part, T{});
        }
        for (int i = 0; i < 2; ++i)
          tile_b[t * kPack + part + i * 4 * kPack][group] = half_of(fragment->b[i], part, T{});
      }
      for (int i = 0; i < 4; ++i) tile_d[group + i / 2 * 8][t * 2 + i % 2] = sum[i];
    }
    simt::multiply_tiles(tile_d, &tile_a[0][0], &tile_b[0][0], kDepth);
    for (int lane = 0; lane < 32; ++lane) {
      auto* sum = static_cast<float*>(out[lane]);
      for (int i = 0; i < 4; ++i) sum[i] = tile_d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  });
}

}  // namespace rf
