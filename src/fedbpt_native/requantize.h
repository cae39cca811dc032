#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace fedbpt {

// Formats that a model file can be written in, smallest first: llama.cpp's names in lower case.
std::vector<std::string> requantize_formats();

// Writes the model `source` in `format` to `target`. Calls go_on(tensors done, total) before each tensor and at the
// end; false cancels. Returns go_on's last result. Throws InputError, ModelFileError.
bool requantize(const std::string & source, const std::string & target, const std::string & format, int32_t n_threads,
                const std::function<bool(int done, int total)> & go_on);

}  // namespace fedbpt
