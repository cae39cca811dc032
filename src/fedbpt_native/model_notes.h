#pragma once

#include <string>
#include <vector>

#include "llama.h"

namespace fedbpt {

// Differences of llama.cpp's computation from the model's reference implementation, a sentence each; llama.cpp itself
// mentions them in its log at most.
std::vector<std::string> notes_on(const std::string & path, const llama_model * model);

}  // namespace fedbpt
