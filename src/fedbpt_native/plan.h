#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model.h"
#include "text_kv.h"

namespace fedbpt {

// front, cue: rows replace embeddings. shift: they are added to the states after layers, from the text's last token on.
enum class Placement { front, cue, shift };

constexpr const char * kNoShifts =
    "the hidden states of this model's layers cannot be shifted, as llama.cpp's graph does not mark its layer outputs: "
    "use placement 'cue'";

// For Placement::shift: the layers whose output the rows are added to, and whether at the continuations' tokens too.
struct ShiftedLayers {
    int32_t first = 0, n = 0;
    bool continued = false;

    bool operator==(const ShiftedLayers & other) const {
        return first == other.first && n == other.n && continued == other.continued;
    }
};

// Concatenated token sequences: sequence i is ids[offsets[i] .. offsets[i + 1]).
struct Ragged {
    std::vector<llama_token> ids;
    std::vector<int64_t> offsets = { 0 };

    size_t size() const { return offsets.size() - 1; }
    size_t length(size_t i) const { return static_cast<size_t>(offsets[i + 1] - offsets[i]); }
    const llama_token * operator[](size_t i) const { return ids.data() + offsets[i]; }
};

// A validated data set to score repeatedly: N ragged texts, their common prefix, the labels whose logits are returned,
// and the continuations of each text whose log-probabilities are returned. In cue placement it also keeps the texts' KV
// up to where the rows begin, within a budget.
class Plan {
public:
    // all_labels: return the logits of the whole vocabulary. continuations: the same number for each text, in the order
    // of the texts. layers: those whose states can be read, ascending.
    // Throws InputError: no texts, an empty text or continuation, a token id outside the vocabulary, a text longer than
    // the context, no such layer.
    Plan(std::shared_ptr<const Model> model, Ragged texts, Placement placement, std::vector<llama_token> prefix,
         bool all_labels, std::vector<llama_token> label_ids, Ragged continuations, std::vector<int32_t> layers,
         uint64_t kv_budget_bytes, ShiftedLayers shifted = {});

    bool is_for(const Model & model) const { return model_.get() == &model; }
    size_t n_texts() const { return texts_.size(); }
    size_t length(size_t i) const { return texts_.length(i); }
    const llama_token * text(size_t i) const { return texts_[i]; }
    Placement placement() const { return placement_; }
    const ShiftedLayers & shifted() const { return shifted_; }
    // tokens computed per candidate: those replaced by rows; else the last one, which yields the logits
    size_t n_tail(size_t n_prompt) const { return placement_ == Placement::shift || n_prompt == 0 ? 1 : n_prompt; }
    const std::vector<llama_token> & prefix() const { return prefix_; }

    bool all_labels() const { return all_labels_; }
    const std::vector<llama_token> & label_ids() const { return label_ids_; }
    // tokens whose logits are computed: the labels, or an arbitrary one if only states are read
    const std::vector<llama_token> & head_ids() const { return head_ids_; }
    // their rows of the output layer; null if rows are not sufficient for the model's logits
    const float * label_head() const { return label_head_.empty() ? nullptr : label_head_.data(); }
    size_t n_labels() const { return all_labels_ ? n_vocab() : label_ids_.size(); }
    size_t n_vocab() const { return static_cast<size_t>(model_->n_vocab()); }

    size_t n_continuations() const { return continuations_.size() / n_texts(); }
    size_t continuation_length(size_t i, size_t k) const { return continuations_.length(i * n_continuations() + k); }
    const llama_token * continuation(size_t i, size_t k) const { return continuations_[i * n_continuations() + k]; }
    // tokens computed for text i's continuations: all but the last of each
    size_t n_steps(size_t i) const;
    // sequences per text: one for each continuation of several tokens, at least one
    size_t n_branches() const { return n_branches_; }

    // columns of the result: log-probabilities of the continuations, then logits
    size_t n_columns() const { return n_continuations() + n_labels(); }
    // whether the model must compute the logits of the whole vocabulary
    bool whole_vocabulary() const { return all_labels_ || n_continuations() > 0; }

    const std::vector<int32_t> & layers() const { return layers_; }
    size_t n_state() const { return layers_.size() * static_cast<size_t>(model_->n_embd()); }

    // Throws InputError if n_prompt rows do not fit text i: into its cue, or before it in the context.
    void check_rows(size_t i, size_t n_prompt) const;

    // --- the texts' KV, for the scorer ---

    // Sets the number of last tokens that the kept KV excludes; drops what was kept for another number.
    void keep_for_tail(size_t n_tail);
    // null if it is not kept
    const TextKvPtr & kv(size_t i) const { return kv_[i]; }
    // Keeps the KV if the budget allows.
    void keep_kv(size_t i, const TextKvPtr & text);

    // --- the texts' states, from which candidates that shift one layer resume ---

    // Whether candidates of n_prompt rows can begin after the shifted layer: they are of one token each.
    bool can_resume(size_t n_prompt) const;
    int32_t resumes_after() const { return shifted_.first; }
    // [n_embd], without a shift; empty if it is not known
    const std::vector<float> & state(size_t i) const { return states_[i]; }
    void drop_state(size_t i) { states_[i] = {}; }
    bool keeps_kv() const { return kv_budget_bytes_ > 0; }
    void keep_state(size_t i, const float * state) { states_[i].assign(state, state + model_->n_embd()); }

    // Forward tokens computed for this plan so far, rounded up; a token that ran some layers only counts as their
    // share.
    uint64_t n_tokens() const;
    void count_tokens(size_t n, int32_t n_layers) { n_layer_tokens_ += n * static_cast<uint64_t>(n_layers); }

    uint64_t kv_bytes() const { return kv_bytes_; }
    size_t n_kept() const { return n_kept_; }

private:
    std::shared_ptr<const Model> model_;
    Ragged texts_;
    Placement placement_;
    ShiftedLayers shifted_;
    std::vector<llama_token> prefix_;
    bool all_labels_;
    std::vector<llama_token> label_ids_;
    std::vector<llama_token> head_ids_;
    std::vector<float> label_head_;
    Ragged continuations_;
    std::vector<int32_t> layers_;
    size_t n_branches_ = 1;

    uint64_t kv_budget_bytes_;
    uint64_t kv_bytes_ = 0;
    size_t n_kept_ = 0;
    size_t n_tail_ = 0;
    uint64_t n_layer_tokens_ = 0;
    std::vector<TextKvPtr> kv_;
    std::vector<std::vector<float>> states_;
};

}  // namespace fedbpt
