// Persistent threads with barriers that spin before they park: a step has hundreds of barriers a few
// microseconds apart, and none of them is worth a system call; between steps a parked thread costs nothing.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace llmb {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return num_threads_; }

  // Runs work(thread) once on every thread, the caller's among them, and returns when all are done.
  void run(const std::function<void(int)>& work);

  // Inside work: returns when every thread has arrived.
  void barrier();

 private:
  void worker(int thread);
  void stop();

  const int num_threads_;
  const std::function<void(int)>* work_ = nullptr;
  bool stopping_ = false;
  alignas(64) std::atomic<uint32_t> epoch_{0};    // a new value: there is work, or the end
  alignas(64) std::atomic<uint32_t> arrived_{0};  // threads at the barrier
  alignas(64) std::atomic<uint32_t> phase_{0};    // barriers passed
  std::vector<std::thread> threads_;
};

}  // namespace llmb
