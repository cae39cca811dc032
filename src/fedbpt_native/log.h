#pragma once

// llama.cpp reports failures to its log alone: keep the last error line, so that an exception can quote it.

#include <string>

namespace fedbpt {

// Installs the log callback, once a process. With FEDBPT_LLAMA_LOG=1 in the environment all lines go to stderr too.
void install_log();

// The last error line since the last call, without llama.cpp's function prefix and newline; may be empty.
std::string take_last_error();

}  // namespace fedbpt
