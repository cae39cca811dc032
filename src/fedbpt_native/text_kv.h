#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "llama.h"

namespace fedbpt {

// The KV of tokens from position 0 on, as returned by llama_state_seq_get_data.
struct TextKv {
    std::vector<llama_token> tokens;
    std::vector<uint8_t> state;
    bool is_long = false;  // computed with LongRoPE's long factors
};
using TextKvPtr = std::shared_ptr<const TextKv>;

// Number of tokens with which both begin.
size_t common_prefix(const std::vector<llama_token> & a, const std::vector<llama_token> & b);

// Finds KV by common prefix, for example that of the same row under another template. It refers weakly to the KV that
// plans keep, and owns that of the latest texts. Not thread-safe.
class TextKvIndex {
public:
    void add(const TextKvPtr & text);

    // The KV with the longest common prefix with `tokens`, and its length; null if that is too short to be useful.
    std::pair<TextKvPtr, size_t> longest(const std::vector<llama_token> & tokens);

private:
    std::unordered_map<uint64_t, std::vector<std::weak_ptr<const TextKv>>> by_beginning_;
    size_t n_entries_ = 0, n_swept_ = 0;

    std::deque<TextKvPtr> latest_;
    size_t latest_bytes_ = 0;
};

}  // namespace fedbpt
