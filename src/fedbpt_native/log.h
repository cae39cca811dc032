#pragma once

// llama.cpp reports failures to its log alone: keep the first error line, which names the cause, so that an exception
// can quote it.

#include <functional>
#include <string>

namespace fedbpt {

// Installs the log callback, once a process. With FEDBPT_LLAMA_LOG=1 in the environment all lines go to stderr too.
void install_log();

// The first error line of this thread since the last call, without llama.cpp's prefixes and newline; may be empty.
// Later lines sum up
// ("failed to load model").
std::string take_error();

// While it lives, its function gets each piece of text that llama.cpp logs on this thread. What it throws ends
// llama.cpp's call, where that is C++ that catches it.
class LogListener {
public:
    explicit LogListener(std::function<void(const char *)> on_text);
    ~LogListener();
    LogListener(const LogListener &) = delete;
    LogListener & operator=(const LogListener &) = delete;

private:
    std::function<void(const char *)> on_text_;
};

}  // namespace fedbpt
