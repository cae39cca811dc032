#pragma once

#include <string>
#include <vector>

#include "llama.h"

namespace fedbpt {

// What llama.cpp computes otherwise than the model's makers do, a sentence each: it says so in its log alone, or not at
// all.
std::vector<std::string> notes_on(const std::string & path, const llama_model * model);

}  // namespace fedbpt
