#include "log.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>

#include "llama.h"

namespace fedbpt {

namespace {

thread_local std::string t_error;  // up to its first newline

thread_local const std::function<void(const char *)> * t_listener = nullptr;

void keep_error(const char * text) {
    if (t_error.empty()) {
        text += std::strspn(text, "\n");
    }
    if (t_error.empty() || t_error.back() != '\n') {
        const char * end = std::strchr(text, '\n');
        t_error.append(text, end != nullptr ? static_cast<size_t>(end + 1 - text) : std::strlen(text));
    }
}

// Removes "function: " from the beginning.
void drop_prefix(std::string & line) {
    const size_t colon = line.find(": ");
    if (colon != std::string::npos && line.find(' ') > colon) {
        line.erase(0, colon + 2);
    }
}

// Escapes terminal control characters, as fedbpt.plain_text does: llama.cpp's log quotes metadata of model files.
void print_plain(const char * text) {
    for (const auto * c = reinterpret_cast<const unsigned char *>(text); *c != 0; ++c) {
        const bool is_c1 = c[0] == 0xc2 && c[1] >= 0x80 && c[1] <= 0x9f;
        const bool is_bidi = c[0] == 0xe2 && ((c[1] == 0x80 && c[2] >= 0xaa && c[2] <= 0xae) ||
                                              (c[1] == 0x81 && c[2] >= 0xa6 && c[2] <= 0xa9));
        if ((c[0] < 0x20 && c[0] != '\n' && c[0] != '\t') || c[0] == 0x7f) {
            std::fprintf(stderr, "\\u%04x", c[0]);
        } else if (is_c1) {
            std::fprintf(stderr, "\\u%04x", *++c);
        } else if (is_bidi) {
            std::fprintf(stderr, "\\u20%02x", ((c[1] & 0x3) << 6) | (c[2] & 0x3f));
            c += 2;
        } else {
            std::fputc(*c, stderr);
        }
    }
}

void on_log(ggml_log_level level, const char * text, void * /*user_data*/) {
    static const bool echo = std::getenv("FEDBPT_LLAMA_LOG") != nullptr;
    if (echo) {
        print_plain(text);
    }
    if (level == GGML_LOG_LEVEL_ERROR) {
        keep_error(text);
    }
    if (t_listener != nullptr) {
        (*t_listener)(text);
    }
}

}  // namespace

void install_log() {
    static std::once_flag once;
    std::call_once(once, [] { llama_log_set(on_log, nullptr); });
}

LogListener::LogListener(std::function<void(const char *)> on_text) : on_text_(std::move(on_text)) {
    t_listener = &on_text_;
}

LogListener::~LogListener() {
    t_listener = nullptr;
}

std::string take_error() {
    std::string line;
    line.swap(t_error);

    while (!line.empty() && (line.back() == '\n' || line.back() == ' ')) {
        line.pop_back();
    }
    drop_prefix(line);
    const std::string summary = "error loading model: ";
    if (line.compare(0, summary.size(), summary) == 0) {
        line.erase(0, summary.size());
        drop_prefix(line);
    }
    return line;
}

}  // namespace fedbpt
