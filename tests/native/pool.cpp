// The worker pool: every task runs once, slots never meet, nested and simultaneous jobs; with any argument instead:
// children made by fork().
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <climits>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#include "check.h"
#include "sharpcore/parallel.h"

namespace {

using sharpcore::parallel_for;
using sharpcore::Scratch;

// A task cannot throw: a function that may is of another type.
static_assert(!std::is_convertible_v<void (*)(const void*, std::int64_t, int), sharpcore::TaskFunction>);
static_assert(!std::is_copy_constructible_v<Scratch> && !std::is_copy_assignable_v<Scratch>);

// What a job of tasks writes without any protection of its own: the pool alone must keep it free of races.
struct Record {
    std::vector<int> runs;       // of each task
    std::vector<long> slots;     // tasks that each slot did
    std::vector<int> occupied;   // whether a task runs in each slot
    std::atomic<int> inside{0};  // tasks that run
    int depth;                   // of jobs inside of tasks

    Record(std::int64_t tasks, int threads, int nested)
        : runs(tasks), slots(threads), occupied(threads), depth(nested) {}
};

void run(Record& record, std::int64_t tasks, int threads);

void task(const void* job, std::int64_t index, int slot) noexcept {
    Record& record = *static_cast<Record*>(const_cast<void*>(job));
    CHECK(index >= 0 && index < static_cast<std::int64_t>(record.runs.size()));
    CHECK(slot >= 0 && slot < static_cast<int>(record.slots.size()));
    CHECK(++record.occupied[slot] == 1);
    CHECK(record.inside.fetch_add(1, std::memory_order_relaxed) < static_cast<int>(record.slots.size()));
    if (record.depth > 0) {
        Record inner(5, 3, record.depth - 1);
        run(inner, 5, 3);
    }
    ++record.runs[index];
    ++record.slots[slot];
    record.inside.fetch_sub(1, std::memory_order_relaxed);
    --record.occupied[slot];
}

void run(Record& record, std::int64_t tasks, int threads) {
    parallel_for(tasks, threads, task, &record);
    for (int runs : record.runs) CHECK(runs == 1);
    long done = 0;
    for (long slot : record.slots) done += slot;
    CHECK(done == tasks);
}

void check_sizes() {
    for (std::int64_t tasks : {0, 1, 2, 3, 7, 64, 1025})
        for (int threads : {1, 2, 3, 8, 17}) {
            Record record(tasks, threads, 0);
            run(record, tasks, threads);
        }
    for (int threads : {0, -1, INT_MIN}) {
        Record record(3, 1, 0);
        run(record, 3, threads);
    }
    parallel_for(0, 2, nullptr, nullptr);
    parallel_for(-1, 2, nullptr, nullptr);
    // No more threads than tasks, whatever is asked for.
    Record record(3, 3, 0);
    run(record, 3, INT_MAX);
}

void check_workers_work() {
    // Tasks that wait for each other end only where each has a thread of its own.
    struct Meeting {
        std::atomic<int> arrived{0};
    } meeting;
    parallel_for(
        4, 4,
        [](const void* job, std::int64_t, int) noexcept {
            Meeting& shared = *static_cast<Meeting*>(const_cast<void*>(job));
            ++shared.arrived;
            while (shared.arrived < 4) std::this_thread::yield();
        },
        &meeting);
    CHECK(meeting.arrived == 4);
}

void check_environment() {
    // Workers that began under another rounding mode round as their caller does.
    for (int mode : {FE_UPWARD, FE_TONEAREST, FE_TOWARDZERO}) {
        CHECK(std::fesetround(mode) == 0);
        struct Meeting {
            int mode;
            std::atomic<int> arrived{0};
        } meeting{mode};
        parallel_for(
            4, 4,
            [](const void* job, std::int64_t, int) noexcept {
                Meeting& shared = *static_cast<Meeting*>(const_cast<void*>(job));
                CHECK(std::fegetround() == shared.mode);
                ++shared.arrived;
                while (shared.arrived < 4) std::this_thread::yield();
            },
            &meeting);
    }
    CHECK(std::fesetround(FE_TONEAREST) == 0);
}

void check_nested() {
    for (int threads : {1, 2, 5}) {
        Record record(9, threads, 2);
        run(record, 9, threads);
    }
}

void check_callers(int depth) {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([=] {
            for (int turn = 0; turn < 200; ++turn) {
                const int threads = 1 + (caller + turn) % 4;
                const std::int64_t tasks = (7 * turn + caller) % 33;
                Record record(tasks, threads, depth);
                run(record, tasks, threads);
            }
        });
    for (std::thread& caller : callers) caller.join();
}

void check_scratch() {
    for (std::int64_t bytes : {0, 1, 63, 64, 65, 4097}) {
        const Scratch scratch(3, bytes);
        for (int slot = 0; slot < 3; ++slot) {
            CHECK(reinterpret_cast<std::uintptr_t>(scratch.slot(slot)) % 64 == 0);
            if (bytes > 0) std::memset(scratch.slot(slot), slot, bytes);
        }
        for (int slot = 0; slot < 3; ++slot)
            for (std::int64_t i = 0; i < bytes; ++i) CHECK(static_cast<char*>(scratch.slot(slot))[i] == slot);
    }
}

// Both sides work on, while other threads of the parent keep its pool busy: so the fork may come in the midst of a job.
void check_fork() {
    std::atomic<bool> stop{false};
    std::thread busy([&] {
        while (!stop) {
            Record record(50, 3, 0);
            run(record, 50, 3);
        }
    });
    for (int turn = 0; turn < 10; ++turn) {
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            alarm(60);
            for (int i = 0; i < 20; ++i) check_workers_work();
            const pid_t grandchild = fork();
            if (grandchild == 0) {
                alarm(60);
                check_workers_work();
                _exit(0);
            }
            int status = 0;
            waitpid(grandchild, &status, 0);
            check_workers_work();
            _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
        }
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        Record record(50, 3, 0);
        run(record, 50, 3);
    }
    stop = true;
    busy.join();
    check_workers_work();
}

}  // namespace

int main(int count, char**) {
    if (count > 1) {
        check_fork();
        return 0;
    }
    check_sizes();
    check_workers_work();
    check_environment();
    check_nested();
    check_callers(0);
    check_callers(1);
    check_scratch();
}
