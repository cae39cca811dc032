#pragma once

// Exceptions of the core; the bindings map each to its class in fedbpt.errors. Every message says what to do.

#include <stdexcept>
#include <string>

namespace fedbpt {

// Converts text that may come from a file to one line of UTF-8: control characters become spaces, invalid bytes \xNN.
std::string one_line(const std::string & text);

struct InputError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};
struct ModelFileError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct UnsupportedModelError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct ScoringInterrupted : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace fedbpt
