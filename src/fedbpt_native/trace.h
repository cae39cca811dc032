#pragma once

// What llama_decode computes, node by node, as text: for the proof that the fork leaves upstream's graphs alone. Uses
// upstream's own API only, so that vendor/llama.cpp/record builds the same file against an unpatched tree.

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "handles.h"

namespace fedbpt {

// A model on one CPU thread with room for kSeqs sequences. Decoding yields the lines of the graph that ran:
//
//     LEAF type [ne] name                        a weight, a KV cache or an input, before the first node that reads it
//     %i OP type [ne] name <- sources {params}   the graph's node i
//
// A source is a leaf's name (#2 for a second leaf of that name) or a node's %i. Strides are given where a tensor is not
// contiguous (nb=), params are the words of op_params in hex. Nothing in it depends on the machine: no address, no
// backend, no kind of buffer.
class GraphTrace {
public:
    static constexpr llama_seq_id kSeqs = 4;

    // The scorer's two ways: flash attention over an f16 KV cache, or neither.
    GraphTrace(const std::string & path, bool flash_attention);
    GraphTrace(const GraphTrace &) = delete;
    GraphTrace & operator=(const GraphTrace &) = delete;

    // One llama_decode of one ubatch: tokens of one sequence from position pos0 on, logits for the last.
    std::vector<std::string> decode(const std::vector<llama_token> & tokens, llama_seq_id seq, llama_pos pos0);

    // how many graphs were run again rather than built anew
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
    std::unordered_map<std::string, int> n_named_;                 // how many leaves have this name
    int n_nodes_ = 0;
};

}  // namespace fedbpt
