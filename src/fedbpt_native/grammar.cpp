#include "grammar.h"

#include <algorithm>
#include <cmath>
#include <exception>

#include "errors.h"
#include "json-schema-to-grammar.h"

namespace fedbpt {

std::string json_grammar(const std::string & schema) {
    try {
        return json_schema_to_grammar(common_json::parse(schema), /*force_gbnf =*/true);
    } catch (const std::exception & error) {
        throw InputError("the JSON schema has no grammar (" + one_line(error.what()) + "): use simpler keywords");
    }
}

GrammarSampler::GrammarSampler(const llama_vocab * vocab, const std::string & grammar) : vocab_(vocab) {
    if (grammar.find('\0') == std::string::npos) {
        try {
            grammar_.reset(llama_sampler_init_grammar(vocab, grammar.c_str(), "root"));
        } catch (const std::exception &) {  // the message is the same
        }
    }
    if (grammar_ == nullptr) {
        throw InputError("the grammar is not GBNF with a rule 'root', or repeats too often: correct or shorten it");
    }
}

void GrammarSampler::follow(const llama_token * ids, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        if (!fits(ids[i])) {
            throw InputError("the text so far does not follow its grammar: begin it anew");
        }
        llama_sampler_accept(grammar_.get(), ids[i]);
    }
}

llama_token GrammarSampler::sample(llama_sampler * chain, const float * logits, size_t n_vocab) {
    load(logits, n_vocab);
    llama_token id = choose(chain);
    if (!fits(id)) {
        load(logits, n_vocab);
        llama_token_data_array all = { candidates_.data(), candidates_.size(), -1, false };
        llama_sampler_apply(grammar_.get(), &all);
        const auto end = std::remove_if(candidates_.begin(), candidates_.end(),
                                        [](const llama_token_data & each) { return std::isinf(each.logit); });
        candidates_.erase(end, candidates_.end());
        if (candidates_.empty()) {
            return kNoToken;
        }
        id = choose(chain);
    }
    llama_sampler_accept(grammar_.get(), id);
    llama_sampler_accept(chain, id);
    return id;
}

void GrammarSampler::load(const float * logits, size_t n_vocab) {
    candidates_.resize(n_vocab);
    for (size_t i = 0; i < n_vocab; ++i) {
        const auto id = static_cast<llama_token>(i);
        candidates_[i] = { id, is_control(id) ? -INFINITY : logits[i], 0.0f };
    }
}

// Control tokens add nothing to a text, but llama.cpp's grammars take them for their names' characters.
bool GrammarSampler::is_control(llama_token id) const {
    return llama_vocab_is_control(vocab_, id) && !llama_vocab_is_eog(vocab_, id);
}

llama_token GrammarSampler::choose(llama_sampler * chain) {
    llama_token_data_array all = { candidates_.data(), candidates_.size(), -1, false };
    llama_sampler_apply(chain, &all);
    return all.data[all.selected].id;
}

bool GrammarSampler::fits(llama_token id) {
    if (is_control(id)) {
        return false;
    }
    llama_token_data one = { id, 1.0f, 0.0f };
    llama_token_data_array alone = { &one, 1, -1, false };
    llama_sampler_apply(grammar_.get(), &alone);
    return !std::isinf(one.logit);
}

}  // namespace fedbpt
