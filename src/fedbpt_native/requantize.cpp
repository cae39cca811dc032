#include "requantize.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <exception>

#include "backends.h"
#include "errors.h"
#include "handles.h"
#include "log.h"
#include "model_file.h"
#include "parts.h"

namespace fedbpt {

namespace {

struct Format {
    const char * name;
    llama_ftype ftype;
};

// all but those that need an importance matrix
constexpr std::array kFormats{
    Format{ "q2_k", LLAMA_FTYPE_MOSTLY_Q2_K },     Format{ "q3_k_m", LLAMA_FTYPE_MOSTLY_Q3_K_M },
    Format{ "q4_0", LLAMA_FTYPE_MOSTLY_Q4_0 },     Format{ "iq4_nl", LLAMA_FTYPE_MOSTLY_IQ4_NL },
    Format{ "q4_k_m", LLAMA_FTYPE_MOSTLY_Q4_K_M }, Format{ "q4_1", LLAMA_FTYPE_MOSTLY_Q4_1 },
    Format{ "q5_k_m", LLAMA_FTYPE_MOSTLY_Q5_K_M }, Format{ "q6_k", LLAMA_FTYPE_MOSTLY_Q6_K },
    Format{ "q8_0", LLAMA_FTYPE_MOSTLY_Q8_0 },     Format{ "bf16", LLAMA_FTYPE_MOSTLY_BF16 },
    Format{ "f16", LLAMA_FTYPE_MOSTLY_F16 },
};

struct Stopped : std::exception {};

}  // namespace

std::vector<std::string> requantize_formats() {
    std::vector<std::string> names;
    for (const Format & format : kFormats) {
        names.emplace_back(format.name);
    }
    return names;
}

bool requantize(const std::string & source, const std::string & target, const std::string & format, int32_t n_threads,
                const std::function<bool(int done, int total)> & go_on) {
    const auto chosen =
        std::find_if(kFormats.begin(), kFormats.end(), [&](const Format & known) { return known.name == format; });
    if (chosen == kFormats.end()) {
        throw InputError("unknown format '" + format + "': choose one of requantize_formats()");
    }
    start_backends();
    const std::string first = model_parts(source).front();
    const ModelFile file(first);

    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = chosen->ftype;
    params.nthread = n_threads;
    params.allow_requantize = true;

    bool stopped = false;
    int total = 0;
    // llama_model_quantize has no callback, but it logs each tensor as "[  1/272] name ..."
    const LogListener listener([&](const char * line) {
        int number = 0;
        if (!stopped && std::sscanf(line, "[%d/%d]", &number, &total) == 2 && !go_on(number - 1, total)) {
            stopped = true;
            throw Stopped();
        }
    });
    take_error();
    bool failed = true;
    try {
        failed = llama_model_quantize(first.c_str(), target.c_str(), &params) != 0;
    } catch (const Stopped &) {
        // llama_model_quantize catches std::exception, but in a wheel its C++ library's type is not this module's
    }
    if (failed && !stopped) {
        throw ModelFileError(source + " cannot be written as " + format + " (" + take_error() +
                             "): fetch it again if it is damaged, or free disk space");
    }
    return !stopped && go_on(total, total);
}

}  // namespace fedbpt
