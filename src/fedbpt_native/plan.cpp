#include "plan.h"

#include <algorithm>
#include <string>

#include "errors.h"

namespace fedbpt {

namespace {

void check_spans(const Ragged & sequences, const char * what) {
    const std::vector<int64_t> & offsets = sequences.offsets;
    if (offsets.empty() || offsets.front() != 0 || offsets.back() != static_cast<int64_t>(sequences.ids.size()) ||
        !std::is_sorted(offsets.begin(), offsets.end())) {
        throw InputError(std::string("the offsets of ") + what + " must ascend from 0 to the number of their tokens");
    }
}

}  // namespace

Plan::Plan(std::shared_ptr<const Model> model, Ragged texts, Placement placement, std::vector<llama_token> prefix,
           bool all_labels, std::vector<llama_token> label_ids, Ragged continuations, std::vector<int32_t> layers,
           uint64_t kv_budget_bytes, ShiftedLayers shifted)
    : model_(std::move(model)),
      texts_(std::move(texts)),
      placement_(placement),
      shifted_(shifted),
      prefix_(std::move(prefix)),
      all_labels_(all_labels),
      label_ids_(std::move(label_ids)),
      continuations_(std::move(continuations)),
      layers_(std::move(layers)),
      kv_budget_bytes_(kv_budget_bytes) {
    check_spans(texts_, "texts");
    check_spans(continuations_, "continuations");
    if (n_texts() == 0) {
        throw InputError("no texts to score: pass at least one token sequence");
    }
    if (continuations_.size() % n_texts() != 0) {
        throw InputError(std::to_string(continuations_.size()) + " continuations for " + std::to_string(n_texts()) +
                         " texts: give each text the same number");
    }
    if (n_columns() == 0 && layers_.empty()) {
        throw InputError("label_ids is empty: name at least one token, or pass None for all");
    }
    const int32_t n_layers = llama_model_n_layer(model_->get());
    for (size_t i = 0; i < layers_.size(); ++i) {
        if (layers_[i] < 0 || layers_[i] >= n_layers) {
            throw InputError("layers must be from 0 to " + std::to_string(n_layers - 1) + ", got " +
                             std::to_string(layers_[i]));
        }
        if (i > 0 && layers_[i] <= layers_[i - 1]) {
            throw InputError("layers must ascend, got " + std::to_string(layers_[i]) + " after " +
                             std::to_string(layers_[i - 1]));
        }
    }
    if (placement_ == Placement::shift &&
        (shifted_.first < 0 || shifted_.n < 1 || shifted_.first + shifted_.n > n_layers)) {
        throw InputError("layer must be from 0 to " + std::to_string(n_layers - 1) + ", got " +
                         std::to_string(shifted_.first));
    }
    for (const llama_token id : prefix_) {
        model_->check_token(id, "prefix token id");
    }
    for (const llama_token id : label_ids_) {
        model_->check_token(id, "label token id");
    }
    for (const llama_token id : texts_.ids) {
        model_->check_token(id, "token id");
    }
    for (const llama_token id : continuations_.ids) {
        model_->check_token(id, "continuation token id");
    }
    for (size_t i = 0; i < n_texts(); ++i) {
        if (length(i) == 0) {
            throw InputError("text " + std::to_string(i) + " is empty: it needs at least one token");
        }
        size_t n_branches = 0;
        for (size_t k = 0; k < n_continuations(); ++k) {
            if (continuation_length(i, k) == 0) {
                throw InputError("continuation " + std::to_string(k) + " of text " + std::to_string(i) +
                                 " is empty: it needs at least one token");
            }
            n_branches += continuation_length(i, k) > 1;
        }
        n_branches_ = std::max(n_branches_, n_branches);
        check_rows(i, 0);
    }
    if (!whole_vocabulary()) {
        head_ids_ = label_ids_.empty() ? std::vector<llama_token>{ 0 } : label_ids_;
        label_head_ = model_->output_rows(head_ids_);
    }
    kv_.resize(n_texts());
    states_.resize(n_texts());
}

bool Plan::can_resume(size_t n_prompt) const {
    const bool one_layer = placement_ == Placement::shift && shifted_.n == 1 && !shifted_.continued;
    const bool one_token = n_branches_ == 1 && continuations_.ids.size() == continuations_.size();
    return one_layer && one_token && n_prompt > 0 && shifted_.first + 1 < llama_model_n_layer(model_->get());
}

uint64_t Plan::n_tokens() const {
    const auto n_layers = static_cast<uint64_t>(llama_model_n_layer(model_->get()));
    return (n_layer_tokens_ + n_layers - 1) / n_layers;
}

size_t Plan::n_steps(size_t i) const {
    size_t n = 0;
    for (size_t k = 0; k < n_continuations(); ++k) {
        n += continuation_length(i, k) - 1;
    }
    return n;
}

void Plan::check_rows(size_t i, size_t n_prompt) const {
    const std::string name = "text " + std::to_string(i) + " has " + std::to_string(length(i)) + " tokens";

    if (placement_ == Placement::shift && n_prompt != 0 && n_prompt != static_cast<size_t>(shifted_.n)) {
        throw InputError("embeds must have one row for each of " + std::to_string(shifted_.n) + " layers, got " +
                         std::to_string(n_prompt));
    }
    if (placement_ == Placement::cue && length(i) < n_prompt) {
        throw InputError(name + ", fewer than the " + std::to_string(n_prompt) +
                         " rows of its cue: use fewer rows or a longer cue");
    }
    const size_t n_before = prefix_.size() + (placement_ == Placement::front ? n_prompt : 0);
    size_t n_after = 0;
    for (size_t k = 0; k < n_continuations(); ++k) {
        n_after = std::max(n_after, continuation_length(i, k) - 1);
    }
    if (n_before + length(i) + n_after > static_cast<size_t>(model_->n_ctx_train())) {
        throw InputError(name + ", with " + std::to_string(n_before) + " of prefix and prompt before it" +
                         (n_after > 0 ? " and " + std::to_string(n_after) + " of a continuation after it" : "") +
                         ", too many for the model's context of " + std::to_string(model_->n_ctx_train()) +
                         ": shorten it");
    }
}

void Plan::keep_for_tail(size_t n_tail) {
    if (n_tail == n_tail_) {
        return;
    }
    n_tail_ = n_tail;
    kv_bytes_ = 0;
    n_kept_ = 0;
    kv_.assign(n_texts(), {});
}

void Plan::keep_kv(size_t i, const TextKvPtr & text) {
    if (kv_[i]) {  // with LongRoPE's other factors
        kv_bytes_ -= kv_[i]->state.size();
        --n_kept_;
        kv_[i] = nullptr;
    }
    if (kv_bytes_ + text->state.size() > kv_budget_bytes_) {
        return;
    }
    kv_bytes_ += text->state.size();
    ++n_kept_;
    kv_[i] = text;
}

}  // namespace fedbpt
