// The worker pool: threads that sleep until a job arrives and take its tasks one by one.
#include "sharpcore/parallel.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace sharpcore {
namespace {

struct Job {
    const TaskFunction function;
    const void* const data;
    const std::int64_t tasks;
    std::atomic<std::int64_t> next{0};
    int free_slots;    // guarded by Pool::mutex_
    int next_slot{1};  // guarded by Pool::mutex_; slot 0 is the caller's
    int active{0};     // guarded by Pool::mutex_
    // How the caller rounds and whether it flushes denormals: no result may depend on which thread computed it. Workers
    // do nothing but jobs, each of which brings its own.
    std::fenv_t arithmetic{};

    void work(int slot) noexcept {
        for (std::int64_t task = next.fetch_add(1, std::memory_order_relaxed); task < tasks;
             task = next.fetch_add(1, std::memory_order_relaxed))
            function(data, task, slot);
    }
};

class Pool {
public:
    const pid_t owner = getpid();

    // False where the workers are busy with another caller's job: nothing was done then.
    bool run(Job& job) {
        // Not a mutex: a task that starts a job would try to lock what its own thread holds, which is undefined.
        if (busy_.exchange(true, std::memory_order_acquire)) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            grow(job.free_slots);
            current_ = &job;
        }
        wake_.notify_all();
        job.work(0);
        std::unique_lock<std::mutex> lock(mutex_);
        current_ = nullptr;
        done_.wait(lock, [&] { return job.active == 0; });
        lock.unlock();
        busy_.store(false, std::memory_order_release);
        return true;
    }

private:
    void grow(int workers) {
        while (workers_ < workers) {
            try {
                std::thread(&Pool::serve, this).detach();
            } catch (const std::exception&) {
                return;
            }
            ++workers_;
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return current_ != nullptr && current_->free_slots > 0; });
            Job& job = *current_;
            --job.free_slots;
            ++job.active;
            const int slot = job.next_slot++;
            lock.unlock();
            std::fesetenv(&job.arithmetic);
            job.work(slot);
            lock.lock();
            if (--job.active == 0) done_.notify_one();
        }
    }

    std::atomic<bool> busy_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable done_;
    Job* current_ = nullptr;
    int workers_ = 0;
};

// The pool of this process. It is never destroyed: detached workers may outlive every static object. After fork() the
// child has none of the parent's threads and cannot know the state of its locks, so it leaves that pool alone.
Pool& pool() {
    static std::atomic<Pool*> instance{nullptr};
    Pool* known = instance.load(std::memory_order_acquire);
    if (known != nullptr && known->owner == getpid()) return *known;
    Pool* fresh = new Pool;
    if (instance.compare_exchange_strong(known, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
    return *known;
}

constexpr std::int64_t kAlignment = 64;
constexpr int kMaxThreads = 1024;

}  // namespace

void parallel_for(std::int64_t tasks, int threads, TaskFunction function, const void* job_data) {
    if (tasks <= 0) return;
    const int workers = static_cast<int>(std::min<std::int64_t>({tasks, std::max(threads, 1), kMaxThreads})) - 1;
    Job job{function, job_data, tasks, {}, workers};
    if (workers > 0) {
        std::fegetenv(&job.arithmetic);
        if (pool().run(job)) return;
    }
    job.work(0);
}

Scratch::Scratch(int slots, std::int64_t bytes_per_slot)
    : stride_((bytes_per_slot + kAlignment - 1) / kAlignment * kAlignment) {
    memory_ =
        static_cast<char*>(::operator new(static_cast<std::size_t>(stride_ * slots), std::align_val_t(kAlignment)));
}

Scratch::~Scratch() { ::operator delete(memory_, std::align_val_t(kAlignment)); }

void* Scratch::slot(int index) const { return memory_ + stride_ * index; }

}  // namespace sharpcore
