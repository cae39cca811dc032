#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace fedbpt {

// The formats that a model file can be written in, smallest first, by llama.cpp's names in lower case.
std::vector<std::string> requantize_formats();

// Writes the model `source` in `format` to `target`. `go_on` is asked before each tensor and at the end, with how many
// are done and how many there are; false ends the work. Returns what it said last. Throws InputError, ModelFileError.
bool requantize(const std::string & source, const std::string & target, const std::string & format, int32_t n_threads,
                const std::function<bool(int done, int total)> & go_on);

}  // namespace fedbpt
