#pragma once

#include <cstdint>
#include <vector>

#include "llama.h"

namespace fedbpt {

// The tokens of one forward pass. clear() keeps the memory for the next use.
class Batch {
public:
    void clear();

    static constexpr int64_t kNone = -1, kUnread = -2;

    // Adds a token to each of the sequences `seqs[n_seqs]`. `output`: index of its logits in the caller's results,
    // kNone, or kUnread: computed but not read.
    void add(llama_token token, llama_pos pos, const llama_seq_id * seqs, size_t n_seqs, int64_t output);
    void add(llama_token token, llama_pos pos, llama_seq_id seq, int64_t output) { add(token, pos, &seq, 1, output); }

    size_t size() const { return token_.size(); }
    size_t n_outputs() const { return n_outputs_; }

    // End of the longest range from `begin` on with at most tokens_max tokens and outputs_max outputs.
    size_t end_of(size_t begin, size_t tokens_max, size_t outputs_max) const;

    // Tokens [begin, end) as a llama_batch, valid until the next change.
    llama_batch view(size_t begin, size_t end);

    int64_t output(size_t i) const { return output_[i]; }

private:
    size_t n_outputs_ = 0;
    std::vector<llama_token> token_;
    std::vector<llama_pos> pos_;
    std::vector<int32_t> n_seq_;
    std::vector<int8_t> wants_output_;
    std::vector<int64_t> output_;
    std::vector<llama_seq_id> seq_;        // sequences of all tokens, concatenated
    std::vector<llama_seq_id *> seq_ptr_;  // into seq_, made by view()
};

}  // namespace fedbpt
