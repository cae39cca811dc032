#include "batch.h"

namespace fedbpt {

void Batch::clear() {
    n_outputs_ = 0;
    token_.clear();
    pos_.clear();
    n_seq_.clear();
    wants_output_.clear();
    output_.clear();
    seq_.clear();
}

void Batch::add(llama_token token, llama_pos pos, const llama_seq_id * seqs, size_t n_seqs, int64_t output) {
    token_.push_back(token);
    pos_.push_back(pos);
    n_seq_.push_back(static_cast<int32_t>(n_seqs));
    wants_output_.push_back(output != kNone ? 1 : 0);
    n_outputs_ += output != kNone;
    output_.push_back(output);
    seq_.insert(seq_.end(), seqs, seqs + n_seqs);
}

size_t Batch::end_of(size_t begin, size_t tokens_max, size_t outputs_max) const {
    size_t end = begin;
    for (size_t n_outputs = 0; end < size() && end - begin < tokens_max; ++end) {
        n_outputs += wants_output_[end] != 0;
        if (n_outputs > outputs_max) {
            break;
        }
    }
    return end;
}

llama_batch Batch::view(size_t begin, size_t end) {
    seq_ptr_.resize(size());
    llama_seq_id * next = seq_.data();
    for (size_t i = 0; i < size(); ++i) {
        seq_ptr_[i] = next;
        next += n_seq_[i];
    }

    llama_batch batch = {};
    batch.n_tokens = static_cast<int32_t>(end - begin);
    batch.token = token_.data() + begin;
    batch.pos = pos_.data() + begin;
    batch.n_seq_id = n_seq_.data() + begin;
    batch.seq_id = seq_ptr_.data() + begin;
    batch.logits = wants_output_.data() + begin;
    return batch;
}

}  // namespace fedbpt
