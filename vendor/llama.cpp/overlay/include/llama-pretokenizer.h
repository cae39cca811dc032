#pragma once

// How texts are split into words before byte pairs are merged. Upstream uses std::regex for most models, which recurses once or
// more for each character that a match holds, 326 bytes of stack a character: some 3,000 equal characters end a thread with 1 MiB.
// The fork splits by the same expressions into the same words, in time linear in the text and without recursion
// (src/llama-regex.h).

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// For tests: from now on, this thread's texts are split by std::regex, as upstream does, or by the fork again.
LLAMA_API void llama_pretokenizer_use_std_regex(bool use);

#ifdef __cplusplus
}
#endif
