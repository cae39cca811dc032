#pragma once

#include <string>
#include <vector>

#include "handles.h"

namespace fedbpt {

// The header of a GGUF file, without its tensors' data. Throws ModelFileError.
GgufPtr open_gguf(const std::string & path);

// The files of a model in order: one, or all parts of a split model (NAME-00001-of-00003.gguf), whichever of them path
// names. Throws ModelFileError where path is no GGUF file, or where a part is missing, cut short or of another model.
std::vector<std::string> model_parts(const std::string & path);

}  // namespace fedbpt
