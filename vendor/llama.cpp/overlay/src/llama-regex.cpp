#include "llama-regex.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "llama-pretokenizer.h"
#include "llama-regex-parser.h"

namespace {

using namespace llama_regex;

thread_local bool t_use_std_regex = false;

constexpr int    kMaxStates = 1 << 14;
constexpr size_t kMaxKept   = 32;  // compiled expressions; a model has six at most

// --- the automaton --------------------------------------------------------------------------------------------------

struct state {
    enum kind_t { ACCEPT, CHAR, CHOICE, CONDITION };

    kind_t kind;
    int    next;
    int    other = -1;  // CHOICE: the state to take if `next` cannot lead to a match
    int    index = -1;  // CHAR: index of its class; CHOICE: of its bit; CONDITION: of its condition
};

struct condition {
    node::kind_t kind;
    bool         negated;
    int          machine;  // LOOKAHEAD: the automaton that must match here
};

// States are ordered so that each comes after those that it leads to without reading a character.
struct machine {
    int              start = 0;
    std::vector<int> order;
};

class automaton {
public:
    explicit automaton(const node & expression) {
        whole_ = add_machine(expression);
    }

    // Results for a text; the memory is reused for the next one.
    struct notes {
        size_t                         size = 0;  // of the text
        std::vector<char>              can, before;
        std::vector<std::vector<char>> holds;
        std::vector<uint64_t>          bits;
    };

    // Appends the lengths of the parts of text[0, n).
    template <typename CharT>
    void split(const CharT * text, size_t n, notes & known, std::vector<size_t> & parts) const {
        known.size = n;
        known.holds.resize(conditions_.size());
        for (size_t i = 0; i < conditions_.size(); ++i) {  // nested conditions come first
            hold(text, i, known);
        }
        walk_back(text, machines_[whole_], known, [&](size_t at) { note(at, known); });

        size_t done = 0, at = 0;
        const auto cut = [&](size_t end) {
            if (end > done) {
                parts.push_back(end - done);
                done = end;
            }
        };
        while (at <= n) {
            if (!bit(known, at, 0)) {
                ++at;
                continue;
            }
            const size_t end = match(known, at);
            cut(at);
            cut(end);
            at = std::max(end, at + 1);
        }
        cut(n);
    }

private:
    int add(state made) {
        if (states_.size() >= kMaxStates) {
            throw std::runtime_error("this pre-tokenizer's regular expression is too large");
        }
        states_.push_back(made);
        return static_cast<int>(states_.size()) - 1;
    }

    int add_machine(const node & expression) {
        const int accept = add({ state::ACCEPT, -1 });
        machine made;
        made.start = build(expression, accept);
        sort(made, accept);
        machines_.push_back(std::move(made));
        return static_cast<int>(machines_.size()) - 1;
    }

    // Builds the states of `expression`, followed by state `next`; returns the first one.
    int build(const node & expression, int next) {
        switch (expression.kind) {
            case node::CLASS:
                classes_.push_back(expression.chars);
                return add({ state::CHAR, next, -1, static_cast<int>(classes_.size()) - 1 });
            case node::SEQUENCE:
                for (auto child = expression.children.rbegin(); child != expression.children.rend(); ++child) {
                    next = build(*child, next);
                }
                return next;
            case node::ALTERNATIVES: {
                int found = build(expression.children.back(), next);
                for (auto child = expression.children.rbegin() + 1; child != expression.children.rend(); ++child) {
                    found = choice(build(*child, next), found);
                }
                return found;
            }
            case node::REPEAT:
                return repeat(expression, next);
            default: {
                const int inside = expression.kind == node::LOOKAHEAD ? add_machine(expression.children[0]) : -1;
                conditions_.push_back({ expression.kind, expression.negated, inside });
                return add({ state::CONDITION, next, -1, static_cast<int>(conditions_.size()) - 1 });
            }
        }
    }

    int choice(int first, int second) {
        return add({ state::CHOICE, first, second, n_bits_++ });
    }

    int repeat(const node & expression, int next) {
        const node & body  = expression.children[0];
        int          found = next;
        if (expression.most == kNoLimit) {
            found = choice(-1, -1);
            const int again = build(body, found);  // may reallocate states_
            states_[found].next  = again;
            states_[found].other = next;
        } else {
            for (int i = expression.least; i < expression.most; ++i) {
                found = choice(build(body, found), next);
            }
        }
        for (int i = 0; i < expression.least; ++i) {
            found = build(body, found);
        }
        return found;
    }

    // Orders all reachable states by depth-first search over the steps that read nothing, which have no cycles.
    void sort(machine & made, int accept) {
        std::vector<char> seen(states_.size(), 0);
        std::vector<int>  roots = { made.start, accept };
        for (size_t i = 0; i < roots.size(); ++i) {
            std::vector<std::pair<int, bool>> open = { { roots[i], false } };
            while (!open.empty()) {
                const auto [at, left] = open.back();
                open.pop_back();
                if (left) {
                    made.order.push_back(at);
                    continue;
                }
                if (seen[at]++) {
                    continue;
                }
                open.emplace_back(at, true);
                const state & here = states_[at];
                if (here.kind == state::CHAR) {
                    roots.push_back(here.next);
                } else if (here.kind != state::ACCEPT) {
                    open.emplace_back(here.next, false);
                    if (here.kind == state::CHOICE) {
                        open.emplace_back(here.other, false);
                    }
                }
            }
        }
    }

    // Backward pass: known.can[state] says whether the text from `at` on leads from the state to a match.
    template <typename CharT, typename Note>
    void walk_back(const CharT * text, const machine & used, notes & known, const Note & note) const {
        known.can.assign(states_.size(), 0);
        known.before.resize(states_.size());
        for (size_t at = known.size + 1; at-- > 0;) {
            known.before.swap(known.can);
            for (const int number : used.order) {
                const state & here = states_[number];
                char can = 0;
                switch (here.kind) {
                    case state::ACCEPT:
                        can = 1;
                        break;
                    case state::CHAR:
                        can = at < known.size && known.before[here.next] && classes_[here.index].holds(unit_of(text[at]));
                        break;
                    case state::CHOICE:
                        can = known.can[here.next] | known.can[here.other];
                        break;
                    case state::CONDITION:
                        can = known.holds[here.index][at] & known.can[here.next];
                        break;
                }
                known.can[number] = can;
            }
            note(at);
        }
    }

    // Records where the condition holds.
    template <typename CharT>
    void hold(const CharT * text, size_t index, notes & known) const {
        std::vector<char> & holds = known.holds[index];
        holds.assign(known.size + 1, 0);
        const condition & asked = conditions_[index];
        if (asked.kind == node::LOOKAHEAD) {
            const machine & inside = machines_[asked.machine];
            walk_back(text, inside, known, [&](size_t at) { holds[at] = known.can[inside.start] != static_cast<char>(asked.negated); });
            return;
        }
        holds[known.size] = 1;  // END
    }

    // For each character: a bit whether a match can begin there, and a bit per choice whether its first alternative can lead to one.
    void note(size_t at, notes & known) const {
        const size_t n_words = static_cast<size_t>(n_bits_)/64 + 1;
        if (at == known.size) {
            known.bits.assign((known.size + 1)*n_words, 0);
        }
        const machine & used = machines_[whole_];
        uint64_t *      row  = known.bits.data() + at*n_words;
        row[0] |= static_cast<uint64_t>(known.can[used.start]);
        for (const int number : used.order) {
            const state & here = states_[number];
            if (here.kind == state::CHOICE && known.can[here.next]) {
                row[here.index/64] |= uint64_t(1) << (here.index % 64);
            }
        }
    }

    bool bit(const notes & known, size_t at, int index) const {
        const size_t n_words = static_cast<size_t>(n_bits_)/64 + 1;
        return (known.bits[at*n_words + static_cast<size_t>(index)/64] >> (index % 64)) & 1;
    }

    // The end of the match that begins at `at`, which must exist.
    size_t match(const notes & known, size_t at) const {
        for (int number = machines_[whole_].start; states_[number].kind != state::ACCEPT;) {
            const state & here = states_[number];
            number = here.kind == state::CHOICE && !bit(known, at, here.index) ? here.other : here.next;
            at += here.kind == state::CHAR;
        }
        return at;
    }

    std::vector<state>      states_;
    std::vector<char_class> classes_;
    std::vector<condition>  conditions_;
    std::vector<machine>    machines_;
    int                     whole_  = 0;
    int                     n_bits_ = 1;  // bit 0: a match can begin
};

// Compiles an expression once per thread: a text with many special tokens is split fragment by fragment.
template <typename CharT>
const automaton & compiled(const std::basic_string<CharT> & regex) {
    thread_local std::unordered_map<std::basic_string<CharT>, std::unique_ptr<const automaton>> known;
    auto found = known.find(regex);
    if (found == known.end()) {
        if (known.size() >= kMaxKept) {
            known.clear();
        }
        std::vector<unit> pattern;
        std::transform(regex.begin(), regex.end(), std::back_inserter(pattern), [](CharT c) { return unit_of(c); });
        found = known.emplace(regex, std::make_unique<automaton>(parser(std::move(pattern)).parse())).first;
    }
    return *found->second;
}

}  // namespace

void llama_pretokenizer_use_std_regex(bool use) {
    t_use_std_regex = use;
}

bool llama_regex_is_std() {
    return t_use_std_regex;
}

template <typename CharT>
std::vector<size_t> llama_regex_split(const std::basic_string<CharT> & text, const std::basic_string<CharT> & regex, const std::vector<size_t> & offsets) {
    const automaton &   used = compiled(regex);
    automaton::notes    known;
    std::vector<size_t> parts;
    parts.reserve(offsets.size());
    size_t start = 0;
    for (const size_t length : offsets) {
        used.split(text.data() + start, length, known, parts);
        start += length;
    }
    return parts;
}

template std::vector<size_t> llama_regex_split(const std::string &, const std::string &, const std::vector<size_t> &);
template std::vector<size_t> llama_regex_split(const std::wstring &, const std::wstring &, const std::vector<size_t> &);
