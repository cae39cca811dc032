#pragma once

// llama.cpp reports the reasons of failures only to its log: the first error line, which names the cause, is kept so
// that an exception can quote it.

#include <functional>
#include <string>

namespace fedbpt {

// Installs the log callback, once per process. With FEDBPT_LLAMA_LOG=1 in the environment, all lines also go to stderr.
void install_log();

// Returns and clears this thread's first error line since the last call, without llama.cpp's prefixes and newline; may
// be empty. Later lines only summarise ("failed to load model").
std::string take_error();

// While it exists, on_text is called with each piece of text that llama.cpp logs on this thread. An exception that it
// throws ends llama.cpp's call if that is C++ code that catches it.
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
