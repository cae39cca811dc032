#include "text_kv.h"

#include <algorithm>

namespace fedbpt {

namespace {

constexpr size_t kBeginning = 8;  // minimum length of a common prefix, in tokens
constexpr size_t kLatest = 32;    // maximum number of texts owned
constexpr size_t kLatestBytes = 256u << 20;

// FNV-1a of the first kBeginning tokens
uint64_t beginning_of(const std::vector<llama_token> & tokens) {
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < kBeginning; ++i) {
        hash = (hash ^ static_cast<uint32_t>(tokens[i])) * 0x100000001b3;
    }
    return hash;
}

}  // namespace

size_t common_prefix(const std::vector<llama_token> & a, const std::vector<llama_token> & b) {
    const auto most = static_cast<std::ptrdiff_t>(std::min(a.size(), b.size()));
    return static_cast<size_t>(std::mismatch(a.begin(), a.begin() + most, b.begin()).first - a.begin());
}

void TextKvIndex::add(const TextKvPtr & text) {
    if (text->tokens.size() < kBeginning) {
        return;
    }
    by_beginning_[beginning_of(text->tokens)].push_back(text);
    if (++n_entries_ > 2 * n_swept_ + 64) {  // drop expired entries
        n_entries_ = 0;
        for (auto entry = by_beginning_.begin(); entry != by_beginning_.end();) {
            auto & texts = entry->second;
            texts.erase(std::remove_if(texts.begin(), texts.end(), [](const auto & each) { return each.expired(); }),
                        texts.end());
            n_entries_ += texts.size();
            entry = texts.empty() ? by_beginning_.erase(entry) : std::next(entry);
        }
        n_swept_ = n_entries_;
    }

    latest_.push_back(text);
    latest_bytes_ += text->state.size();
    while (latest_.size() > kLatest || (latest_bytes_ > kLatestBytes && latest_.size() > 1)) {
        latest_bytes_ -= latest_.front()->state.size();
        latest_.pop_front();
    }
}

std::pair<TextKvPtr, size_t> TextKvIndex::longest(const std::vector<llama_token> & tokens) {
    std::pair<TextKvPtr, size_t> best{ nullptr, kBeginning - 1 };
    if (tokens.size() < kBeginning) {
        return best;
    }
    const auto found = by_beginning_.find(beginning_of(tokens));
    if (found == by_beginning_.end()) {
        return best;
    }
    for (const auto & entry : found->second) {
        const TextKvPtr text = entry.lock();
        if (!text) {
            continue;
        }
        const size_t same = common_prefix(tokens, text->tokens);
        if (same > best.second) {
            best = { text, same };
        }
    }
    return best;
}

}  // namespace fedbpt
