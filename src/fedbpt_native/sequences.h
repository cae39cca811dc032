#pragma once

#include "llama.h"

namespace fedbpt {

// Which of a context's sequences stands for what.
constexpr llama_seq_id kPadSeq = 0;     // tokens that only fill a batch up
constexpr llama_seq_id kPrefixSeq = 1;  // the scorer: what comes before everything
constexpr llama_seq_id kFirstSeq = 2;   // the scorer: the first slot's

}  // namespace fedbpt
