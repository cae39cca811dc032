#include "deep_stack.h"

#include <pthread.h>

#include <exception>
#include <new>

namespace fedbpt {

namespace {

struct Work {
    const std::function<void()> & call;
    std::exception_ptr            thrown;

    static void * run(void * self_) {
        auto * self = static_cast<Work *>(self_);
        try {
            self->call();
        } catch (...) {
            self->thrown = std::current_exception();
        }
        return nullptr;
    }
};

}  // namespace

void run_with_stack(size_t bytes, const std::function<void()> & call) {
    constexpr size_t kPage = 1 << 16;  // a multiple of every system's
    Work             work { call, nullptr };
    pthread_attr_t   attributes;
    pthread_t        thread;

    pthread_attr_init(&attributes);
    const bool started = pthread_attr_setstacksize(&attributes, (bytes + kPage - 1)/kPage*kPage) == 0 && pthread_create(&thread, &attributes, Work::run, &work) == 0;
    pthread_attr_destroy(&attributes);
    if (!started) {
        throw std::bad_alloc();
    }
    pthread_join(thread, nullptr);
    if (work.thrown) {
        std::rethrow_exception(work.thrown);
    }
}

}  // namespace fedbpt
