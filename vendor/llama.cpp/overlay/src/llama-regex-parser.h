#pragma once

// Parses a regular expression to a tree. See llama-regex.h for the supported syntax.

#include <algorithm>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace llama_regex {

using unit = uint32_t;  // a char of the text, or a wchar_t

template <typename CharT>
unit unit_of(CharT c) {
    return static_cast<unit>(static_cast<std::make_unsigned_t<CharT>>(c));
}

constexpr int kNoLimit   = -1;

// --- classes of characters ------------------------------------------------------------------------------------------

class char_class {
public:
    void add(unit first, unit last) { ranges_.emplace_back(first, last); }
    void add(const char_class & other) { parts_.push_back(other); }
    void negate() { negated_ = true; }

    // Call once, before holds().
    void finish() {
        for (unit c = 0; c < table_.size(); ++c) {
            table_[c] = search(c);
        }
    }

    bool holds(unit c) const { return c < table_.size() ? table_[c] : search(c); }

private:
    bool search(unit c) const {
        const bool found = std::any_of(ranges_.begin(), ranges_.end(), [c](const auto & range) { return range.first <= c && c <= range.second; }) ||
                           std::any_of(parts_.begin(), parts_.end(), [c](const char_class & part) { return part.search(c); });
        return found != negated_;
    }

    std::vector<std::pair<unit, unit>> ranges_;
    std::vector<char_class>            parts_;
    std::bitset<256>                   table_;
    bool                               negated_ = false;
};

// \d \s \w and, in capitals, their complements
inline char_class escaped_class(char letter) {
    char_class found;
    switch (letter) {
        case 'd': case 'D':
            found.add('0', '9');
            break;
        case 's': case 'S':
            found.add('\t', '\r');
            found.add(' ', ' ');
            break;
        default:
            found.add('0', '9');
            found.add('A', 'Z');
            found.add('_', '_');
            found.add('a', 'z');
    }
    if (letter < 'a') {
        found.negate();
    }
    return found;
}

inline bool is_word(unit c) {
    return c < 128 && ((c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || c == '_' || (c >= 'a' && c <= 'z'));
}

// --- the expression as a tree ---------------------------------------------------------------------------------------

struct node {
    enum kind_t { CLASS, SEQUENCE, ALTERNATIVES, REPEAT, LOOKAHEAD, END };

    explicit node(kind_t kind) : kind(kind) {}

    kind_t            kind;
    char_class        chars;            // CLASS
    std::vector<node> children;
    int               least   = 0;      // REPEAT
    int               most    = 0;
    bool              negated = false;  // LOOKAHEAD

    bool may_be_empty() const {
        const auto empty = [](const node & child) { return child.may_be_empty(); };
        switch (kind) {
            case CLASS:        return false;
            case SEQUENCE:     return std::all_of(children.begin(), children.end(), empty);
            case ALTERNATIVES: return std::any_of(children.begin(), children.end(), empty);
            case REPEAT:       return least == 0 || children[0].may_be_empty();
            default:           return true;
        }
    }
};

class parser {
public:
    explicit parser(std::vector<unit> pattern) : pattern_(std::move(pattern)) {}

    node parse() {
        node all = alternatives();
        if (at_ < pattern_.size()) {
            refuse("an unmatched )");
        }
        return all;
    }

private:
    bool more() const { return at_ < pattern_.size(); }
    bool is(char c, size_t ahead = 0) const { return at_ + ahead < pattern_.size() && pattern_[at_ + ahead] == unit_of(c); }

    bool take(char c) {
        const bool found = is(c);
        at_ += found;
        return found;
    }

    unit next() {
        if (!more()) {
            refuse("an end where more should come");
        }
        return pattern_[at_++];
    }

    [[noreturn]] void refuse(const char * what) const {
        throw std::runtime_error("this pre-tokenizer's regular expression has " + std::string(what) + " at " + std::to_string(at_) + ", which is not supported");
    }

    node alternatives() {
        node found(node::ALTERNATIVES);
        do {
            node sequence(node::SEQUENCE);
            while (more() && !is('|') && !is(')')) {
                sequence.children.push_back(quantified(atom()));
            }
            found.children.push_back(std::move(sequence));
        } while (take('|'));
        return found.children.size() == 1 ? std::move(found.children[0]) : std::move(found);
    }

    node atom() {
        const unit c = next();
        switch (c) {
            case '(': return group();
            case '[': return bracket();
            case '\\': return escape();
            case '$': return node(node::END);
            case '.': {
                char_class line_ends;
                line_ends.add('\n', '\n');
                line_ends.add('\r', '\r');
                line_ends.negate();
                return of(std::move(line_ends));
            }
            case '*': case '+': case '?': case '{':
                refuse("a quantifier of nothing");
            case '^':
                refuse("a ^");
            default: return literal(c);
        }
    }

    node group() {
        const bool special = take('?'), positive = special && take('='), negative = special && !positive && take('!');
        if (special && !positive && !negative && !take(':')) {
            refuse("a group of another kind");
        }
        node inside = alternatives();
        if (!take(')')) {
            refuse("an unmatched (");
        }
        if (!positive && !negative) {
            return inside;
        }
        node found(node::LOOKAHEAD);
        found.negated = negative;
        found.children.push_back(std::move(inside));
        return found;
    }

    node escape() {
        const unit c = next();
        if (is_class_letter(c)) {
            return of(escaped_class(static_cast<char>(c)));
        }
        return literal(escaped(c));
    }

    static bool is_class_letter(unit c) { return c == 'd' || c == 'D' || c == 's' || c == 'S' || c == 'w' || c == 'W'; }

    unit escaped(unit c) {
        switch (c) {
            case 'f': return '\f';
            case 'n': return '\n';
            case 'r': return '\r';
            case 't': return '\t';
            case 'v': return '\v';
            default: break;
        }
        if (is_word(c) && c != '_') {
            refuse("an escape");
        }
        return c;
    }

    node bracket() {
        char_class found;
        const bool negated = take('^');
        if (is(']')) {
            refuse("an empty class");
        }
        while (!take(']')) {
            unit first = next();
            if (first == '[' && (is(':') || is('.') || is('='))) {
                refuse("a named class");
            }
            if (first == '\\') {
                first = next();
                if (is_class_letter(first)) {
                    found.add(escaped_class(static_cast<char>(first)));
                    continue;
                }
                first = escaped(first);
            }
            if (!is('-') || is(']', 1)) {
                found.add(first, first);
                continue;
            }
            next();
            unit last = next();
            if (last == '\\') {
                last = escaped(next());
            }
            if (last < first) {
                refuse("a range that ends before it begins");
            }
            found.add(first, last);
        }
        if (negated) {
            found.negate();
        }
        return of(std::move(found));
    }

    node quantified(node inside) {
        int least = 1, most = 1;
        if (take('*')) {
            least = 0, most = kNoLimit;
        } else if (take('+')) {
            most = kNoLimit;
        } else if (take('?')) {
            least = 0;
        } else if (take('{')) {
            least = number();
            most  = least;
            if (take(',')) {
                most = is('}') ? kNoLimit : number();
            }
            if (!take('}') || (most != kNoLimit && most < least)) {
                refuse("a quantifier");
            }
        } else {
            return inside;
        }
        node found(node::REPEAT);
        found.least = least;
        found.most  = most;
        if (is('*') || is('+') || is('?') || is('{')) {
            refuse("a quantifier of a quantifier");
        }
        if (most == kNoLimit && inside.may_be_empty()) {
            refuse("a loop over nothing");
        }
        found.children.push_back(std::move(inside));
        return found;
    }

    int number() {
        int found = 0, digits = 0;
        for (; more() && pattern_[at_] >= '0' && pattern_[at_] <= '9' && digits < 5; ++digits) {
            found = 10*found + static_cast<int>(next() - '0');
        }
        if (digits == 0 || digits == 5) {
            refuse("a number");
        }
        return found;
    }

    static node of(char_class chars) {
        node found(node::CLASS);
        found.chars = std::move(chars);
        found.chars.finish();
        return found;
    }

    static node literal(unit c) {
        char_class one;
        one.add(c, c);
        return of(std::move(one));
    }

    std::vector<unit> pattern_;
    size_t            at_ = 0;
};

}  // namespace llama_regex
