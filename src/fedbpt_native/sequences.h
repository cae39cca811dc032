#pragma once

#include "llama.h"

namespace fedbpt {

// Which of a context's sequences stands for what.
constexpr llama_seq_id kPrefixSeq = 0;  // what comes before everything
constexpr llama_seq_id kPadSeq    = 1;  // tokens that only fill a batch up
constexpr llama_seq_id kFirstSeq  = 2;  // the first slot's

}  // namespace fedbpt
