#pragma once

// RAII for the C handles of llama.cpp and ggml.

#include <sys/types.h>
#include <unistd.h>

#include <memory>

#include "backends.h"
#include "ggml-cpu.h"
#include "gguf.h"
#include "llama.h"

namespace fedbpt {

struct ModelDeleter {
    void operator()(llama_model * model) const { llama_model_free(model); }
};
struct ContextDeleter {
    void operator()(llama_context * ctx) const { llama_free(ctx); }
};
struct SamplerDeleter {
    void operator()(llama_sampler * sampler) const { llama_sampler_free(sampler); }
};
// A forked process has the pool but not its threads: waiting for them to end would never return.
struct ThreadpoolDeleter {
    pid_t owner = getpid();

    void operator()(ggml_threadpool * pool) const {
        if (getpid() == owner) {
            cpu_function<decltype(ggml_threadpool_free)>("ggml_threadpool_free")(pool);
        }
    }
};
struct GgufDeleter {
    void operator()(gguf_context * gguf) const { gguf_free(gguf); }
};

using ModelPtr = std::unique_ptr<llama_model, ModelDeleter>;
using ContextPtr = std::unique_ptr<llama_context, ContextDeleter>;
using SamplerPtr = std::unique_ptr<llama_sampler, SamplerDeleter>;
using ThreadpoolPtr = std::unique_ptr<ggml_threadpool, ThreadpoolDeleter>;
using GgufPtr = std::unique_ptr<gguf_context, GgufDeleter>;

}  // namespace fedbpt
