#pragma once

#include <string>
#include <vector>

#include "handles.h"

namespace fedbpt {

// The header of a GGUF file, without its tensors' data. Throws ModelFileError.
GgufPtr open_gguf(const std::string & path);

// Files of a model in order: `path`, or all parts of a split model (NAME-00001-of-00003.gguf) of which `path` is any.
// Throws ModelFileError if `path` is not a GGUF file, or a part is missing, truncated or of another model.
std::vector<std::string> model_parts(const std::string & path);

}  // namespace fedbpt
