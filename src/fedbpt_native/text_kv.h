#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "llama.h"

namespace fedbpt {

// The KV of some tokens from position 0 on, as llama_state_seq_get_data gave it.
struct TextKv {
    std::vector<llama_token> tokens;
    std::vector<uint8_t> state;
};
using TextKvPtr = std::shared_ptr<const TextKv>;

// Finds the KV of a text that begins as another one does: the same row of a data set under another template. It knows
// what plans keep for as long as they do, and holds on to the latest texts itself. Not thread-safe.
class TextKvIndex {
public:
    void add(const TextKvPtr & text);

    // What begins with the most of `tokens`, and with how many; null where it is too few to be worth it.
    std::pair<TextKvPtr, size_t> longest(const std::vector<llama_token> & tokens);

private:
    std::unordered_map<uint64_t, std::vector<std::weak_ptr<const TextKv>>> by_beginning_;
    size_t n_entries_ = 0, n_swept_ = 0;

    std::deque<TextKvPtr> latest_;
    size_t latest_bytes_ = 0;
};

}  // namespace fedbpt
