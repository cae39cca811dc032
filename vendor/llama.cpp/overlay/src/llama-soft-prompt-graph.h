#pragma once

// The interface of soft prompts to upstream's graph builder. See include/llama-soft-prompt.h.

#include "llama-soft-prompt.h"

#include "llama-arch.h"
#include "llama-cparams.h"

#include "ggml-backend.h"

#include <array>
#include <cstdint>
#include <vector>

struct ggml_context;
struct ggml_tensor;
struct llama_hparams;
struct llama_ubatch;
class  llm_graph_result;
class  llm_graph_input_i;
struct llm_graph_context;

// Tables (sequence, position) -> row, (sequence, positions, layers) -> rows to add, and (sequence, position, layer) -> state. Shared by
// a context and the graph parameters copied from it.
class llama_soft_prompt {
public:
    void set(llama_seq_id seq_id, llama_pos pos0, int32_t n_rows, const float * rows);
    void clear();

    // the row for token i of the ubatch, or nullptr; n_embd floats
    const float * find(const llama_ubatch & ubatch, uint32_t i, int64_t n_embd) const;

    bool touches(const llama_ubatch & ubatch) const;

    // --- shifts ---

    struct shift {
        llama_pos     pos0     = 0;
        llama_pos     pos1     = 0;  // exclusive
        int32_t       layer    = 0;  // the first one
        int32_t       n_layers = 0;  // 0: no shift
        const float * rows     = nullptr;
    };

    void set_shift(llama_seq_id seq_id, const shift & shift);

    // The shift of token i of the ubatch, or nullptr.
    const shift * find_shift(const llama_ubatch & ubatch, uint32_t i) const;

    // The shifts in the ubatch, each once, in their tokens' order.
    std::vector<const shift *> shifts_of(const llama_ubatch & ubatch) const;

    // --- states ---

    struct state {
        llama_pos     pos   = 0;
        int32_t       layer = 0;
        const float * row   = nullptr;  // null: no state
    };

    void set_state(llama_seq_id seq_id, const state & state);

    // The state of token i of the ubatch, or nullptr.
    const state * find_state(const llama_ubatch & ubatch, uint32_t i) const;

    // The layer after which the ubatch's computation resumes; -1: it has no states.
    int32_t resumes_after(const llama_ubatch & ubatch) const;

    // whether all graphs since clear() have added all shifts of their ubatches, and begun with their states
    bool shifted = true;

    // whether no graph since clear() that began with states has read what layers that it left out should have written
    bool resumed = true;

    bool row_attention = false;
    bool keeps_masked_cells = false;

    // length in tokens of the longest text of the next llama_decode; 0: unknown, use the context's size
    uint32_t text_length = 0;

    // --- label logits ---

    void set_labels(const ggml_tensor * output, const llama_token * ids, int32_t n, const float * rows);

    size_t n_labels() const { return labels.size(); }

    // whether the label head replaces this matrix
    bool is_output(const ggml_tensor * w) const { return head != nullptr && w == output; }
    const float * label_head() const { return head; }

    // Copies the label logits and the states of a ubatch's n outputs from its graph; false if upstream's own logits are requested.
    bool take_outputs(ggml_backend_sched_t sched, const ggml_tensor * logits, int64_t n_before, int64_t n);
    const float * label_logits() const { return taken.data(); }

    // --- layers' states ---

    std::vector<int32_t> taps; // layers
    llm_graph_input_i  * building = nullptr; // input of the graph that is being built

    // Sets the tensors [n_embd, n_outputs] of the graph that runs next, one per tap, null if missing.
    void run_taps(const std::vector<ggml_tensor *> & tensors) { tapped = &tensors; }
    const float * states() const { return has_states ? states_taken.data() : nullptr; }

private:
    struct run {
        llama_pos     pos0   = 0;
        int32_t       n_rows = 0;
        const float * rows   = nullptr;
    };

    std::array<run,   LLAMA_MAX_SEQ> runs {};
    std::array<shift, LLAMA_MAX_SEQ> shifts {};
    std::array<state, LLAMA_MAX_SEQ> states_set {};
    bool any       = false;
    bool any_shift = false;
    bool any_state = false;

    const ggml_tensor      * output = nullptr;
    std::vector<llama_token> labels;
    const float            * head   = nullptr;
    std::vector<float>       taken;

    bool take_logits(const ggml_tensor * logits, int64_t n_before, int64_t n);
    void take_states(int64_t n_before, int64_t n);

    const std::vector<ggml_tensor *> * tapped = nullptr;
    std::vector<float>                 states_taken;
    bool                               has_states = false;
};

// embd*keep + soft if the ubatch has soft rows, else embd itself
ggml_tensor * llama_soft_prompt_build(
        ggml_context        * ctx0,
        llm_graph_result    * res,
        llm_arch              arch,
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_ubatch  & ubatch,
        ggml_tensor         * embd);

// Called with the output cur [n_embd, n_tokens, or n_outputs after the last layer] of layer il. Returns it with the ubatch's shifts of this
// layer added; or the ubatch's states of this layer in its place, and the graph then computes nothing that was built before. If the layer
// is tapped, its rows for the outputs become an output of the graph.
ggml_tensor * llama_soft_prompt_layer(const llm_graph_context & graph, ggml_tensor * cur, int il);

// the label head in place of the output matrix; w itself for other matrices
ggml_tensor * llama_soft_prompt_output(
        ggml_context        * ctx0,
        llm_graph_result    * res,
        const llama_cparams & cparams,
        ggml_tensor         * w);

// Requests row attention for the node if the context uses it.
void llama_soft_prompt_attention(ggml_tensor * node, const llama_cparams & cparams);

// Whether a tensor of the model that this thread is loading stays in the mapped file instead of being repacked for this CPU.
bool llama_soft_prompt_leaves_in_file(const ggml_tensor * meta);
