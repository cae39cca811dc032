#pragma once

#include "llama.h"

namespace fedbpt {

// The use of a context's sequences.
constexpr llama_seq_id kPadSeq = 0;     // padding tokens of a batch
constexpr llama_seq_id kPrefixSeq = 1;  // scorer: the prefix
constexpr llama_seq_id kFirstSeq = 2;   // scorer: the first slot

}  // namespace fedbpt
