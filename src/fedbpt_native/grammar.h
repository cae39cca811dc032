#pragma once

#include <string>
#include <vector>

#include "handles.h"

namespace fedbpt {

// The GBNF grammar (llama.cpp's) of the JSON that a JSON schema allows. Throws InputError.
std::string json_grammar(const std::string & schema);

// Chooses tokens that a grammar allows.
class GrammarSampler {
public:
    static constexpr llama_token kNoToken = -3;

    // grammar: GBNF whose rule "root" is the whole text. Throws InputError.
    GrammarSampler(const llama_vocab * vocab, const std::string & grammar);

    // Puts the beginning of the text behind the grammar. Throws InputError if it does not fit.
    void follow(const llama_token * ids, size_t n);

    // Chooses a token by `chain` from those that continue the text; `chain` and the grammar are then behind it. If the
    // first choice fits, the other tokens are not looked at. kNoToken: no token fits.
    llama_token sample(llama_sampler * chain, const float * logits, size_t n_vocab);

private:
    void load(const float * logits, size_t n_vocab);
    bool is_control(llama_token id) const;
    llama_token choose(llama_sampler * chain);
    bool fits(llama_token id);

    const llama_vocab * vocab_;
    SamplerPtr grammar_;
    std::vector<llama_token_data> candidates_;
};

}  // namespace fedbpt
