#pragma once

#include <cstdint>
#include <vector>

#include "llama.h"

namespace fedbpt {

// The tokens of one forward pass, growing as they are added; memory is kept between uses.
class Batch {
public:
    void clear();

    // `output` is where this token's logits go (an index of the caller's), -1 for none. The token belongs to each of
    // `seqs[n_seqs]`.
    void add(llama_token token, llama_pos pos, const llama_seq_id * seqs, size_t n_seqs, int32_t output);
    void add(llama_token token, llama_pos pos, llama_seq_id seq, int32_t output) { add(token, pos, &seq, 1, output); }

    size_t size() const { return token_.size(); }

    // Tokens [begin, end) as llama.cpp wants them; valid until the next change.
    llama_batch view(size_t begin, size_t end);

    int32_t output(size_t i) const { return output_[i]; }

private:
    std::vector<llama_token>    token_;
    std::vector<llama_pos>      pos_;
    std::vector<int32_t>        n_seq_;
    std::vector<int8_t>         wants_output_;
    std::vector<int32_t>        output_;
    std::vector<llama_seq_id>   seq_;     // all tokens' sequences, one after another
    std::vector<llama_seq_id *> seq_ptr_; // into seq_, made by view()
};

}  // namespace fedbpt
