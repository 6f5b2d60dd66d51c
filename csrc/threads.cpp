#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace llmb {
namespace {

constexpr int kBarrierSpins = 4000;  // some tens of microseconds
constexpr int kIdleSpins = 20000;    // sampling and scheduling between two steps fit in

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void wait_until_changed(const std::atomic<uint32_t>& value, uint32_t old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads) {
  try {
    for (int t = 1; t < num_threads; ++t) threads_.emplace_back([this, t] { worker(t); });
  } catch (...) {  // the system has no more threads to give
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& t : threads_) t.join();
}

void ThreadPool::run(const std::function<void(int)>& work) {
  work_ = &work;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  work(0);
  barrier();
}

void ThreadPool::barrier() {
  if (num_threads_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(num_threads_)) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  wait_until_changed(phase_, phase, kBarrierSpins);
}

void ThreadPool::worker(int thread) {
  for (uint32_t epoch = 0;;) {
    wait_until_changed(epoch_, epoch, kIdleSpins);
    epoch = epoch_.load(std::memory_order_acquire);
    if (stopping_) return;
    (*work_)(thread);
    barrier();
  }
}

}  // namespace llmb
