#pragma once

// The part of soft prompts that upstream's graph builder sees: see include/llama-soft-prompt.h.

#include "llama-soft-prompt.h"

#include "llama-arch.h"
#include "llama-cparams.h"

#include <array>
#include <cstdint>

struct ggml_context;
struct ggml_tensor;
struct llama_hparams;
struct llama_ubatch;
class  llm_graph_result;

// (sequence, position) -> row. Shared by a context and the graph parameters copied from it.
class llama_soft_prompt {
public:
    void set(llama_seq_id seq_id, llama_pos pos0, int32_t n_rows, const float * rows);
    void clear();

    // the row for token i of the ubatch, or nullptr; n_embd floats
    const float * find(const llama_ubatch & ubatch, uint32_t i, int64_t n_embd) const;

    bool touches(const llama_ubatch & ubatch) const;

private:
    struct run {
        llama_pos     pos0   = 0;
        int32_t       n_rows = 0;
        const float * rows   = nullptr;
    };

    std::array<run, LLAMA_MAX_SEQ> runs {};
    bool any = false;
};

// embd*keep + soft where the ubatch has soft rows, embd itself where it has none
ggml_tensor * llama_soft_prompt_build(
        ggml_context        * ctx0,
        llm_graph_result    * res,
        llm_arch              arch,
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_ubatch  & ubatch,
        ggml_tensor         * embd);
