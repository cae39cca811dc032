#include "log.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <utility>

#include <pthread.h>

#include "llama.h"

namespace fedbpt {

namespace {

std::mutex  g_mutex;
std::string g_last_error;

thread_local const std::function<void(const char *)> * t_listener = nullptr;

void on_log(ggml_log_level level, const char * text, void * /*user_data*/) {
    static const bool echo = std::getenv("FEDBPT_LLAMA_LOG") != nullptr;
    if (echo) {
        std::fputs(text, stderr);
    }
    if (level == GGML_LOG_LEVEL_ERROR) {
        std::lock_guard<std::mutex> lock(g_mutex);
        g_last_error = text;
    }
    if (t_listener != nullptr) {
        (*t_listener)(text);
    }
}

}  // namespace

void install_log() {
    static std::once_flag once;
    std::call_once(once, [] {
        llama_log_set(on_log, nullptr);
        // a process that is forked while another thread holds the mutex would wait for that thread, which it does not have
        const auto release = [] { g_mutex.unlock(); };
        pthread_atfork([] { g_mutex.lock(); }, release, release);
    });
}

LogListener::LogListener(std::function<void(const char *)> on_text) : on_text_(std::move(on_text)) {
    t_listener = &on_text_;
}

LogListener::~LogListener() {
    t_listener = nullptr;
}

std::string take_last_error() {
    std::lock_guard<std::mutex> lock(g_mutex);

    std::string line;
    line.swap(g_last_error);

    while (!line.empty() && (line.back() == '\n' || line.back() == ' ')) {
        line.pop_back();
    }
    const size_t colon = line.find(": ");
    if (colon != std::string::npos && line.find(' ') > colon) {
        line.erase(0, colon + 2);
    }
    return line;
}

}  // namespace fedbpt
