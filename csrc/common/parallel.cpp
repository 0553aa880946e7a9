// The threads are torch's: its OpenMP runtime is already in the process when this library is imported, and a
// second pool of spinning threads would slow both. Looking GOMP_parallel up at run time also keeps the
// build free of any OpenMP of its own. Without GOMP (macOS, say) a small pool stands in.
#include "parallel.h"

#include <dlfcn.h>

#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace llmkern {
namespace {

struct Gomp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_num)();
  int (*num_threads)();
  int (*in_parallel)();
  Gomp() {
    auto find = [](const char* name) { return dlsym(RTLD_DEFAULT, name); };
    parallel = reinterpret_cast<decltype(parallel)>(find("GOMP_parallel"));
    thread_num = reinterpret_cast<decltype(thread_num)>(find("omp_get_thread_num"));
    num_threads = reinterpret_cast<decltype(num_threads)>(find("omp_get_num_threads"));
    in_parallel = reinterpret_cast<decltype(in_parallel)>(find("omp_in_parallel"));
  }
  bool found() const { return parallel && thread_num && num_threads && in_parallel; }
};

const Gomp& gomp() {
  static const Gomp g;
  return g;
}

struct Region {
  ParallelBody body;
  void* context;
};

// A pool of the usual kind: workers sleep on a condition until a region is published.
class Pool {
 public:
  void run(int threads, ParallelBody body, void* context) {
    std::unique_lock<std::mutex> one_region_at_a_time(entry_, std::try_to_lock);
    if (inside_ || !one_region_at_a_time) return body(context, 0, 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        int id = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, id, seen = generation_]() mutable { work(id, seen); });
      }
      region_ = {body, context};
      threads_ = threads;
      pending_ = threads - 1;
      generation_++;
    }
    start_.notify_all();
    inside_ = true;
    body(context, 0, threads);
    inside_ = false;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  void work(int id, uint64_t seen) {
    inside_ = true;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (id >= threads_) continue;
      Region region = region_;
      int threads = threads_;
      lock.unlock();
      region.body(region.context, id, threads);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex entry_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> workers_;
  Region region_{};
  int threads_ = 0, pending_ = 0;
  uint64_t generation_ = 0;
  static thread_local bool inside_;
};
thread_local bool Pool::inside_ = false;

}  // namespace

void run_parallel(int threads, ParallelBody body, void* context) {
  if (threads <= 1) return body(context, 0, 1);
  if (!gomp().found()) {
    static Pool* pool = new Pool;  // never destroyed: its threads live as long as the process
    return pool->run(threads, body, context);
  }
  if (gomp().in_parallel()) return body(context, 0, 1);
  Region region{body, context};
  gomp().parallel(
      [](void* r) {
        auto* region = static_cast<Region*>(r);
        region->body(region->context, gomp().thread_num(), gomp().num_threads());
      },
      &region, static_cast<unsigned>(threads), 0);
}

const char* parallel_source() { return gomp().found() ? "torch's OpenMP threads" : "a thread pool of llmkern"; }

void* scratch(Scratch slot, size_t bytes) {
  struct Block {
    void* memory = nullptr;
    size_t size = 0;
    ~Block() { std::free(memory); }
  };
  static thread_local Block blocks[static_cast<int>(Scratch::count)];
  Block& block = blocks[static_cast<int>(slot)];
  if (bytes > block.size) {
    size_t size = (bytes + 4095) / 4096 * 4096;
    void* memory = std::aligned_alloc(4096, size);
    if (!memory) throw std::bad_alloc();
    std::free(block.memory);
    block.memory = memory;
    block.size = size;
  }
  return block.memory;
}

}  // namespace llmkern
