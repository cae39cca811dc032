#pragma once

// Finds the special tokens in a text, with the same result as upstream's llama_vocab::impl::tokenizer_st_partition but in time linear in
// the number of tokens found. Upstream walks the list of fragments for each of them: 300,000 blank lines took minutes.

#include <bitset>
#include <cctype>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>

// The set of adjacent byte pairs in a text. Most tokens of a vocabulary hold a pair that the text lacks, and need no search.
class llama_byte_pairs {
public:
    explicit llama_byte_pairs(std::string_view text) {
        for (size_t i = 1; i < text.size(); ++i) {
            pairs_.set(pair(text, i));
        }
    }

    bool may_hold(std::string_view token) const {
        for (size_t i = 1; i < token.size(); ++i) {
            if (!pairs_.test(pair(token, i))) {
                return false;
            }
        }
        return true;
    }

private:
    static size_t pair(std::string_view text, size_t i) { return static_cast<uint8_t>(text[i - 1])*256u + static_cast<uint8_t>(text[i]); }

    std::bitset<65536> pairs_;
};

// `fragments`: a forward list with one fragment, the whole text. `lookup(id)`: a token's text and attributes; `is_skipped(attributes)`:
// whether to ignore a token.
template <typename Fragments, typename Ids, typename Lookup, typename Skipped>
void llama_partition(Fragments & fragments, const Ids & special, const Lookup & lookup, const Skipped & is_skipped, int lstrip, int rstrip, int raw) {
    if (fragments.empty()) {
        return;
    }
    const std::string &    text = fragments.front().raw_text;
    const llama_byte_pairs pairs(text);

    for (const auto id : special) {
        const auto & token = lookup(id);
        if (is_skipped(token.attr) || token.text.empty() || !pairs.may_hold(token.text)) {
            continue;
        }
        auto before = fragments.before_begin();
        for (auto it = fragments.begin(); it != fragments.end(); it = std::next(before)) {
            if (static_cast<int>(it->type) != raw) {
                before = it;
                continue;
            }
            size_t       begin = it->offset;
            const size_t end   = begin + it->length;
            const auto   seen  = std::string_view(text.data(), end);
            size_t       found = seen.find(token.text, begin);
            if (found == std::string_view::npos) {
                before = it;
                continue;
            }
            for (; found != std::string_view::npos; found = seen.find(token.text, begin)) {
                size_t left = found;
                while ((token.attr & lstrip) && left > begin && isspace(text[left - 1])) {
                    --left;
                }
                if (left > begin) {
                    before = fragments.emplace_after(before, text, static_cast<int64_t>(begin), static_cast<int64_t>(left - begin));
                }
                before = fragments.emplace_after(before, id);
                begin  = found + token.text.size();
                while ((token.attr & rstrip) && begin < end && isspace(text[begin])) {
                    ++begin;
                }
            }
            if (begin < end) {
                before = fragments.emplace_after(before, text, static_cast<int64_t>(begin), static_cast<int64_t>(end - begin));
            }
            fragments.erase_after(before);  // the fragment that was split
        }
    }
}
