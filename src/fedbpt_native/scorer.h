#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "batch.h"
#include "handles.h"
#include "model.h"

namespace fedbpt {

enum class Placement { front, cue };

// N texts, ragged: text i is ids[offsets[i] .. offsets[i + 1]).
struct Texts {
    const llama_token * ids     = nullptr;
    const int64_t     * offsets = nullptr;
    size_t              n       = 0;

    size_t length(size_t i) const { return static_cast<size_t>(offsets[i + 1] - offsets[i]); }
    const llama_token * begin(size_t i) const { return ids + offsets[i]; }
};

struct ScoreRequest {
    Texts         texts;
    const float * embeds       = nullptr;  // [n_candidates][n_prompt][n_embd]
    size_t        n_candidates = 0;
    size_t        n_prompt     = 0;
    Placement     placement    = Placement::front;

    const llama_token * prefix   = nullptr;
    size_t              n_prefix = 0;

    const llama_token * label_ids = nullptr;  // null: all of the vocabulary
    size_t              n_labels  = 0;
};

struct MemoryUse {
    uint64_t weights = 0, kv = 0, compute = 0;  // bytes
};

// Scores texts under soft prompts. One call at a time: a second thread's waits.
//
// Each candidate goes through the very same sequence of batches, in the same KV cells: its logits depend on no other
// candidate, on their number or order, nor on earlier calls, and repeat bit for bit.
class Scorer {
public:
    Scorer(std::shared_ptr<const Model> model, int32_t n_threads);

    // out[n_candidates][texts.n][n_labels]. `stop` is asked every few milliseconds, on this thread, whether to give up.
    // Throws InputError, ScoringInterrupted.
    void score(const ScoreRequest & request, float * out, const std::function<bool()> & stop);

    // Makes the call in flight, if any, throw ScoringInterrupted.
    void interrupt() { interrupted_ = true; }

    MemoryUse memory() const;
    int32_t n_threads() const { return n_threads_; }

private:
    struct Pack {  // texts [first, last): one forward pass
        size_t first, last;
    };

    void validate(const ScoreRequest & request) const;
    std::vector<Pack> pack(const ScoreRequest & request) const;
    void ensure_context(const ScoreRequest & request, const std::vector<Pack> & packs);

    void run(const ScoreRequest & request, float * out);
    void score_front(const ScoreRequest & request, const Pack & pack, size_t candidate, bool first_pack, float * out);
    void score_cue(const ScoreRequest & request, const Pack & pack, float * out);

    void add_text(const ScoreRequest & request, size_t text, llama_seq_id seq, size_t n_tokens, llama_pos pos0, bool output);
    void decode(const ScoreRequest & request, float * out);
    void reset();

    static bool on_abort(void * self);

    std::shared_ptr<const Model> model_;
    const int32_t                n_threads_;
    ThreadpoolPtr                threadpool_;
    ContextPtr                   ctx_;
    uint32_t                     n_ctx_ = 0;
    Batch                        batch_;
    std::vector<llama_seq_id>    seqs_;  // scratch

    mutable std::mutex                    mutex_;
    std::atomic<bool>                     interrupted_ { false };
    const std::function<bool()>         * stop_ = nullptr;
    std::chrono::steady_clock::time_point next_stop_check_;
};

}  // namespace fedbpt
