#include "sampling.h"

#include <cmath>
#include <string>

#include "errors.h"

namespace fedbpt {

void check_sampling(const Sampling & sampling) {
    if (!(sampling.temperature >= 0.0f && std::isfinite(sampling.temperature))) {
        throw InputError("temperature must be finite and at least 0, got " + std::to_string(sampling.temperature));
    }
    if (!(sampling.top_p > 0.0f && sampling.top_p <= 1.0f)) {
        throw InputError("top_p must be above 0 and at most 1, got " + std::to_string(sampling.top_p));
    }
    if (sampling.top_k < 0) {
        throw InputError("top_k must be 0 (all) or more, got " + std::to_string(sampling.top_k));
    }
}

SamplerPtr make_sampler(const Sampling & sampling) {
    SamplerPtr chain(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    const auto add = [&](llama_sampler * sampler) { llama_sampler_chain_add(chain.get(), sampler); };

    if (sampling.temperature == 0.0f) {
        add(llama_sampler_init_greedy());
        return chain;
    }
    if (sampling.top_k > 0) {
        add(llama_sampler_init_top_k(sampling.top_k));
    }
    if (sampling.top_p < 1.0f) {
        add(llama_sampler_init_top_p(sampling.top_p, /*min_keep =*/1));
    }
    add(llama_sampler_init_temp(sampling.temperature));
    add(llama_sampler_init_dist(sampling.seed));
    return chain;
}

}  // namespace fedbpt
