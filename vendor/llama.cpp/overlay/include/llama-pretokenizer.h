#pragma once

// Splits texts into words before byte pairs are merged. Upstream uses std::regex for most models, which recurses at least once for each
// character of a match, at 326 bytes of stack: about 3,000 equal characters overflow a stack of 1 MiB. The fork splits by the same
// expressions into the same words, in linear time and without recursion (src/llama-regex.h).

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// For tests: whether this thread splits texts by std::regex, as upstream does, or by the fork's implementation.
LLAMA_API void llama_pretokenizer_use_std_regex(bool use);

#ifdef __cplusplus
}
#endif
