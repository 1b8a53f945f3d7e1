// Kernels with a known fault each, and their sound twins: the runtime must stop the first and pass the second.
#include <cstdio>
#include <cstring>
#include <memory>

#include "common/primitives.cuh"
#include "host.h"

namespace simt {

namespace {

using rf::SharedAddress;

// Each thread passes its number to its neighbour through shared memory that already holds values.
void rotate(float* out, bool with_barrier) {
  RF_SHARED_ARRAY(float, values, 64);
  const int t = rf::thread_x();
  rf::store_shared(values + t * 4, -1.0f);
  rf::barrier();
  rf::store_shared(values + t * 4, static_cast<float>(t));
  if (with_barrier) rf::barrier();
  out[t] = rf::load_shared<float>(values + (t + 1) % 64 * 4);
}

// Reads, then overwrites what another thread may still be reading.
void overwrite(float* out, bool with_barrier) {
  const SharedAddress values = rf::dynamic_shared();
  const int t = rf::thread_x();
  rf::store_shared(values + t * 4, static_cast<float>(t));
  rf::barrier();
  out[t] = rf::load_shared<float>(values + (t + 1) % 64 * 4);
  if (with_barrier) rf::barrier();
  rf::store_shared(values + t * 4, 0.0f);
}

void rotate_in_warp(float* out, bool with_barrier) {
  const SharedAddress values = rf::dynamic_shared();
  const int t = rf::thread_x();
  rf::store_shared(values + t * 4, -1.0f);
  rf::warp_barrier();
  rf::store_shared(values + t * 4, static_cast<float>(t));
  if (with_barrier) rf::warp_barrier();
  out[t] = rf::load_shared<float>(values + (t / 32 * 32 + (t + 1) % 32) * 4);
}

enum class Sync { kNone, kWait, kWaitAndBarrier };

// Each thread fetches 16 bytes, over older values, and reads its neighbour's (its own without a barrier to rely on).
void copy_async(const float* in, float* out, Sync sync, int distance) {
  const SharedAddress values = rf::dynamic_shared();
  const int t = rf::thread_x();
  rf::store_shared(values + t * 16, rf::Vector<float, 4>{});
  rf::barrier();
  rf::async_copy<16>(values + t * 16, in + t * 4, true);
  rf::async_commit();
  if (sync != Sync::kNone) rf::async_wait<0>();
  if (sync == Sync::kWaitAndBarrier) rf::barrier();
  out[t] = rf::load_shared<float>(values + (t + distance) % 64 * 16);
  rf::async_wait<0>();
}

// Each thread writes V behind one another, `stride` bytes apart, a warp apart from the other.
template <class V>
void scatter(int stride) {
  const int t = rf::thread_x();
  rf::store_shared(rf::dynamic_shared() + t / 32 * (32 * stride) + t % 32 * stride, V{});
}

void run(const std::function<void()>& body) { launch({2, 1, 1}, 64, 64 * 16, body); }

}  // namespace

void run_planted(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  const std::unique_ptr<float[]> in(new float[256]()), out(new float[64]());
  if (is("sound")) {
    run([&] { rotate(out.get(), true); });
    for (int t = 0; t < 64; ++t) {
      if (out[t] != static_cast<float>((t + 1) % 64)) fail("wrong value %f at %d", out[t], t);
    }
    run([&] { overwrite(out.get(), true); });
    run([&] { rotate_in_warp(out.get(), true); });
    run([&] { copy_async(in.get(), out.get(), Sync::kWaitAndBarrier, 1); });
    run([&] {
      const float sum = rf::shuffle_xor(static_cast<float>(rf::thread_x()), 1) + rf::shuffle(1.0f, 3);
      if (sum != static_cast<float>((rf::thread_x() ^ 1) + 1)) fail("wrong shuffle");
      if (rf::ballot(rf::thread_x() % 2 == 0) != 0x55555555u) fail("wrong ballot");
    });
  } else if (is("banks")) {
    const auto count = [](const std::function<void()>& body) {
      const uint64_t before = banks().total();
      launch({1, 1, 1}, 64, 64 * 128, body);
      std::printf("%llu ", static_cast<unsigned long long>(banks().total() - before));
    };
    count([] { scatter<float>(4); });
    count([] { scatter<float>(8); });
    count([] { scatter<float>(128); });
    count([] { scatter<rf::Vector<float, 2>>(8); });
    count([] { scatter<rf::Vector<float, 2>>(16); });
    count([] { scatter<rf::Vector<float, 4>>(16); });
    count([] { scatter<rf::Vector<float, 4>>(32); });
    count([] { scatter<rf::fp16>(2); });
    count([] {  // a word for all, and lanes that stay out, in a second pass of a loop
      if (rf::thread_x() % 32 == 0) rf::store_shared(rf::dynamic_shared() + rf::thread_x() / 32 * 4, 1.0f);
      rf::barrier();
      for (int i = 0; i < 2; ++i) {
        if (i == 0 || rf::thread_x() % 32 < 2) rf::load_shared<float>(rf::dynamic_shared() + rf::thread_x() / 32 * 4);
      }
    });
    count([] {
      rf::store_shared(rf::dynamic_shared() + rf::thread_x() * 16, rf::Vector<float, 4>{});
      rf::warp_barrier();
      uint32_t out[4];
      rf::load_matrix<4>(out, rf::dynamic_shared() + rf::thread_x() / 32 * 512 + rf::thread_x() % 16 * 32);
    });
    std::printf("\n");
  } else if (is("missing_barrier")) {
    run([&] { rotate(out.get(), false); });
  } else if (is("write_after_read")) {
    run([&] { overwrite(out.get(), false); });
  } else if (is("missing_warp_barrier")) {
    run([&] { rotate_in_warp(out.get(), false); });
  } else if (is("missing_wait")) {
    run([&] { copy_async(in.get(), out.get(), Sync::kNone, 0); });
  } else if (is("missing_barrier_after_wait")) {
    run([&] { copy_async(in.get(), out.get(), Sync::kWait, 1); });
  } else if (is("divergent_barrier")) {
    run([&] {
      if (rf::thread_x() != 5) rf::barrier();
    });
  } else if (is("two_barriers")) {
    run([&] {
      if (rf::thread_x() < 32) {
        rf::barrier();
      } else {
        rf::barrier();
      }
    });
  } else if (is("divergent_warp")) {
    run([&] {
      if (rf::thread_x() != 5) rf::ballot(true);
    });
  } else if (is("stored_twice")) {
    write_once(out.get(), 64 * sizeof(float));
    run([&] { rf::store_global(out.get() + rf::thread_x(), 1.0f); });  // by both blocks
  } else if (is("shared_out_of_bounds")) {
    run([&] { rf::store_shared(rf::dynamic_shared() + 64 * 16, 1.0f); });
  } else if (is("shared_uninitialised")) {
    run([&] { out[0] = rf::load_shared<float>(rf::dynamic_shared()); });
  } else if (is("shared_misaligned")) {
    run([&] { rf::store_shared(rf::dynamic_shared() + 2, 1.0f); });
  } else if (is("global_out_of_bounds_store")) {
    run([&] { rf::store_global(out.get() + 1 + rf::thread_x(), 1.0f); });
  } else if (is("global_out_of_bounds_load")) {
    run([&] { out[0] = rf::load_global<float>(out.get() + 64); });
  } else if (is("global_misaligned")) {
    run([&] { rf::store_global(out.get() + 1, rf::Vector<float, 4>{}); });
  } else if (is("async_copy_out_of_bounds")) {
    run([&] {
      rf::async_copy<16>(rf::dynamic_shared() + rf::thread_x() * 16, in.get() + (rf::thread_x() + 1) * 4, true);
      rf::async_commit();
      rf::async_wait<0>();
    });
  } else if (is("copy_left_behind")) {
    run([&] { rf::async_copy<16>(rf::dynamic_shared() + rf::thread_x() * 16, in.get(), true); });
  } else {
    fail("no planted fault %s", name);
  }
}

}  // namespace simt
