#pragma once

#include <cstdint>
#include <vector>

#include "llama.h"

namespace fedbpt {

// The tokens of one forward pass, growing as they are added; memory is kept between uses.
class Batch {
public:
    void clear();

    static constexpr int64_t kNone = -1, kUnread = -2;

    // `output` is where this token's logits go (an index of the caller's), kNone, or kUnread: computed, and left. The
    // token belongs to each of `seqs[n_seqs]`.
    void add(llama_token token, llama_pos pos, const llama_seq_id * seqs, size_t n_seqs, int64_t output);
    void add(llama_token token, llama_pos pos, llama_seq_id seq, int64_t output) { add(token, pos, &seq, 1, output); }

    size_t size() const { return token_.size(); }
    size_t n_outputs() const { return n_outputs_; }

    // Where tokens from `begin` on have to end for one llama_decode: at most this many, and outputs among them.
    size_t end_of(size_t begin, size_t tokens_max, size_t outputs_max) const;

    // Tokens [begin, end) as llama.cpp wants them; valid until the next change.
    llama_batch view(size_t begin, size_t end);

    int64_t output(size_t i) const { return output_[i]; }

private:
    size_t n_outputs_ = 0;
    std::vector<llama_token> token_;
    std::vector<llama_pos> pos_;
    std::vector<int32_t> n_seq_;
    std::vector<int8_t> wants_output_;
    std::vector<int64_t> output_;
    std::vector<llama_seq_id> seq_;        // all tokens' sequences, one after another
    std::vector<llama_seq_id *> seq_ptr_;  // into seq_, made by view()
};

}  // namespace fedbpt
