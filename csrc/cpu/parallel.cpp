// Jobs on several threads, which take their tasks one by one: those of OpenMP, or workers that sleep until a job
// arrives.
#include "sharpcore/parallel.h"

#include <dlfcn.h>
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
    const int threads;  // at most
    std::atomic<std::int64_t> next{0};
    std::atomic<int> next_slot{0};
    std::int64_t places{0};  // for workers to join: guarded by Pool::mutex_
    int active{0};           // workers: guarded by Pool::mutex_
    // How the caller rounds and whether it flushes denormals: no result may depend on which thread computed it.
    std::fenv_t arithmetic{};

    void work() noexcept {
        std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
        if (task >= tasks) return;
        const int slot = next_slot.fetch_add(1, std::memory_order_relaxed);
        for (; task < tasks; task = next.fetch_add(1, std::memory_order_relaxed)) function(data, task, slot);
    }

    // For a thread that is not the caller's.
    void help() noexcept {
        std::fenv_t own;
        std::fegetenv(&own);
        std::fesetenv(&arithmetic);
        work();
        std::fesetenv(&own);
    }
};

// Runs function(data) on every thread of a team, the calling one among them: what compilers make of OpenMP's parallel
// regions.
using Team = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

const pid_t first_process = getpid();

class Pool {
public:
    const pid_t owner = getpid();

    // False where the workers are busy with another caller's job: nothing was done then.
    bool run(Job& job) {
        // Not a mutex: a task that starts a job would try to lock what its own thread holds, which is undefined.
        if (busy_.exchange(true, std::memory_order_acquire)) return false;
        if (team_ != nullptr)
            team_([](void* data) { static_cast<Job*>(data)->help(); }, &job, static_cast<unsigned>(job.threads), 0);
        else
            run_on_workers(job);
        busy_.store(false, std::memory_order_release);
        return true;
    }

private:
    void run_on_workers(Job& job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job.places = std::min<std::int64_t>(job.tasks, job.threads) - 1;
            grow(job.places);
            current_ = &job;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        current_ = nullptr;
        done_.wait(lock, [&] { return job.active == 0; });
    }

    void grow(std::int64_t workers) {
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
            wake_.wait(lock, [&] { return current_ != nullptr && current_->places > 0; });
            Job& job = *current_;
            --job.places;
            ++job.active;
            lock.unlock();
            job.help();
            lock.lock();
            if (--job.active == 0) done_.notify_one();
        }
    }

    // The threads of PyTorch's OpenMP, where it is one that offers them under GNU's name. They spin for milliseconds
    // after each operation of PyTorch before they sleep, so they begin at once, and threads of our own beside them
    // would have to wait for a core. OpenMP does not survive fork().
    const Team team_ = owner == first_process ? reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel")) : nullptr;
    std::atomic<bool> busy_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable done_;
    Job* current_ = nullptr;
    std::int64_t workers_ = 0;
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
    Job job{function, job_data, tasks, std::min(threads, kMaxThreads)};
    if (tasks > 1 && job.threads > 1) {
        std::fegetenv(&job.arithmetic);
        if (pool().run(job)) return;
    }
    job.work();
}

Scratch::Scratch(int slots, std::int64_t bytes_per_slot)
    : stride_((bytes_per_slot + kAlignment - 1) / kAlignment * kAlignment) {
    memory_ =
        static_cast<char*>(::operator new(static_cast<std::size_t>(stride_ * slots), std::align_val_t(kAlignment)));
}

Scratch::~Scratch() { ::operator delete(memory_, std::align_val_t(kAlignment)); }

void* Scratch::slot(int index) const { return memory_ + stride_ * index; }

}  // namespace sharpcore
