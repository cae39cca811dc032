#pragma once

// The graph that llama_decode computes, node by node, as text: for the test that the fork does not change upstream's
// graphs. Uses only upstream's API, so that vendor/llama.cpp/record can build this file against an unpatched tree.

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "handles.h"

namespace fedbpt {

// A model on one CPU thread with kSeqs sequences. Decoding returns the lines of the graph that was computed:
//
//     LEAF type [ne] name                        a weight, a KV cache or an input, before the first node that reads it
//     %i OP type [ne] name <- sources {params}   the graph's node i
//
// A source is a leaf's name (#2 for a second leaf of that name) or a node's %i. Strides are given if a tensor is not
// contiguous (nb=), params are the words of op_params in hex. Nothing depends on the machine: no address, backend or
// buffer type.
class GraphTrace {
public:
    static constexpr llama_seq_id kSeqs = 4;

    // The scorer's two modes: flash attention over an f16 KV cache, or no flash attention over an f32 one.
    GraphTrace(const std::string & path, bool flash_attention);
    GraphTrace(const GraphTrace &) = delete;
    GraphTrace & operator=(const GraphTrace &) = delete;

    // Runs one llama_decode of one ubatch: tokens of one sequence from position pos0 on, with logits for the last.
    std::vector<std::string> decode(const std::vector<llama_token> & tokens, llama_seq_id seq, llama_pos pos0);

    // number of graphs that were reused instead of built
    int32_t n_reused() const { return llama_perf_context(ctx_.get()).n_reused; }

    llama_context * context() const { return ctx_.get(); }
    int32_t n_embd() const { return llama_model_n_embd(model_.get()); }

private:
    static bool on_node(ggml_tensor * node, bool ask, void * self);

    void record(const ggml_tensor * node);
    std::string source(const ggml_tensor * tensor);

    ModelPtr model_;
    ContextPtr ctx_;

    std::vector<std::string> lines_;
    std::unordered_map<const ggml_tensor *, std::string> labels_;  // of the nodes and leaves seen in this decode
    std::unordered_map<std::string, int> n_named_;                 // number of leaves with each name
    int n_nodes_ = 0;
};

}  // namespace fedbpt
