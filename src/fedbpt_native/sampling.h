#pragma once

#include <cstdint>

#include "handles.h"

namespace fedbpt {

// Settings of llama.cpp's samplers. temperature 0: always the likeliest token.
struct Sampling {
    float temperature = 0.0f;
    float top_p = 1.0f;
    int32_t top_k = 0;  // 0: all
    uint32_t seed = 0;
};

// Throws InputError for settings out of range.
void check_sampling(const Sampling & sampling);

SamplerPtr make_sampler(const Sampling & sampling);

}  // namespace fedbpt
