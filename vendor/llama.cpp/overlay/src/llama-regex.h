#pragma once

// Regular expressions without backtracking: linear time, a few bits of memory per character, no recursion on the text.
//
// An expression is compiled to a nondeterministic automaton whose choices are ordered as backtracking would try them. A backward pass
// over the text records, for each character, which choices can lead to a match; a forward pass then takes the first such choice each
// time. This yields the match that backtracking finds, since it tries choices in the same order.
//
// Supports the part of ECMAScript's syntax that pre-tokenizers use: classes, groups, alternatives, greedy quantifiers, lookahead, $.
// Anything else throws std::runtime_error, and so does a loop whose body may match the empty text.

#include <cstddef>
#include <string>
#include <vector>

// Whether this thread splits texts by std::regex (llama_pretokenizer_use_std_regex).
bool llama_regex_is_std();

// Splits each of the consecutive parts of `text`, of lengths `offsets`, at the matches of `regex`; returns the lengths of the new parts.
// Each match is a part, and so is the text between two matches. No part is empty.
template <typename CharT>
std::vector<size_t> llama_regex_split(const std::basic_string<CharT> & text, const std::basic_string<CharT> & regex, const std::vector<size_t> & offsets);
