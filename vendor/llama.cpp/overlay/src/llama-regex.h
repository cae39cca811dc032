#pragma once

// Regular expressions without backtracking: time linear in the text, memory of some bits a character, no recursion on the text.
//
// An expression becomes a nondeterministic automaton whose choices have an order, as backtracking would try them. A pass over the
// text from its end notes, for each character, which choices can still lead to a match; a pass from its beginning then takes at each
// choice the first that can. That is the match which backtracking finds, as it tries choices in the same order.
//
// Of ECMAScript's syntax, what pre-tokenizers use: classes, groups, alternatives, greedy quantifiers, lookahead, $. Anything else throws
// std::runtime_error, and so does a loop whose body may match the empty text.

#include <cstddef>
#include <string>
#include <vector>

// Whether this thread's texts are to be split by std::regex (llama_pretokenizer_use_std_regex).
bool llama_regex_is_std();

// Lengths of the parts of `text` after splitting each of its consecutive parts, of lengths `offsets`, at the matches of `regex`: each
// match is a part, and so is what lies between two. There are no empty parts.
template <typename CharT>
std::vector<size_t> llama_regex_split(const std::basic_string<CharT> & text, const std::basic_string<CharT> & regex, const std::vector<size_t> & offsets);
