#include "plan.h"

#include <string>

#include "errors.h"

namespace fedbpt {

Plan::Plan(std::shared_ptr<const Model> model, std::vector<llama_token> ids, std::vector<int64_t> offsets, Placement placement, std::vector<llama_token> prefix,
           bool all_labels, std::vector<llama_token> label_ids, uint64_t kv_budget_bytes)
    : model_(std::move(model)),
      ids_(std::move(ids)),
      offsets_(std::move(offsets)),
      placement_(placement),
      prefix_(std::move(prefix)),
      all_labels_(all_labels),
      label_ids_(std::move(label_ids)),
      kv_budget_bytes_(kv_budget_bytes) {
    if (offsets_.size() < 2) {
        throw InputError("no texts to score: pass at least one token sequence");
    }
    if (offsets_.front() != 0 || offsets_.back() != static_cast<int64_t>(ids_.size())) {
        throw InputError("the texts' offsets do not span their tokens");
    }
    if (!all_labels_ && label_ids_.empty()) {
        throw InputError("label_ids is empty: name at least one token, or pass None for all");
    }
    for (const llama_token id : prefix_) {
        model_->check_token(id, "prefix token id");
    }
    for (const llama_token id : label_ids_) {
        model_->check_token(id, "label token id");
    }
    for (size_t i = 0; i < n_texts(); ++i) {
        if (offsets_[i + 1] <= offsets_[i]) {
            throw InputError("text " + std::to_string(i) + " is empty: it needs at least one token");
        }
        for (size_t j = 0; j < length(i); ++j) {
            model_->check_token(text(i)[j], "token id");
        }
        check_rows(i, 0);
    }
    if (!all_labels_) {
        label_head_ = model_->output_rows(label_ids_);
    }
    kv_.resize(n_texts());
}

void Plan::check_rows(size_t i, size_t n_prompt) const {
    const std::string name = "text " + std::to_string(i) + " has " + std::to_string(length(i)) + " tokens";

    if (placement_ == Placement::cue && length(i) < n_prompt) {
        throw InputError(name + ", fewer than the " + std::to_string(n_prompt) + " rows that stand in its cue");
    }
    const size_t n_before = prefix_.size() + (placement_ == Placement::front ? n_prompt : 0);
    if (n_before + length(i) > static_cast<size_t>(model_->n_ctx_train())) {
        throw InputError(name + " after " + std::to_string(n_before) + " of prefix and prompt; the model's context is " + std::to_string(model_->n_ctx_train()) + ": shorten it");
    }
}

void Plan::keep_for_tail(size_t n_tail) {
    if (n_tail == n_tail_) {
        return;
    }
    n_tail_   = n_tail;
    kv_bytes_ = 0;
    n_kept_   = 0;
    kv_.assign(n_texts(), {});
}

std::vector<uint8_t> Plan::keep_kv(size_t i, std::vector<uint8_t> state) {
    if (kv_bytes_ + state.size() > kv_budget_bytes_) {
        return state;
    }
    kv_bytes_ += state.size();
    ++n_kept_;
    kv_[i] = std::move(state);
    return {};
}

}  // namespace fedbpt
